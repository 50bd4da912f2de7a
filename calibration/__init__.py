"""What is fitted to one site's few shots without training a network."""
