"""The base of every engine: sessions, specs of components and tensors, graph checks."""
