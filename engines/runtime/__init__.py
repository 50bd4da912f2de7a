"""What every engine stands on: sessions, specs of components and tensors, graph checks."""
