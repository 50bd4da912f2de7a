"""Training of a student: networks, data, the training loop."""
