"""synthkit: a handful of photos becomes an image classifier that runs on an edge device."""

__version__ = "0.1.0"
