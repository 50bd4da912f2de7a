"""From classes and a style to a synthetic set."""
