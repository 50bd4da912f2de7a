"""From a student and real photos to the adapted student."""
