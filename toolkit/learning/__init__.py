"""How a student learns: networks, data, the training loop."""
