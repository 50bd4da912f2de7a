"""Which synthetic images are fit to learn from."""
