"""Generators: the bundled one, and how any is found and read."""
