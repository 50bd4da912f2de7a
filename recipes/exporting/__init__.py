"""From a student to a verified bundle."""
