"""TensorRT: plans decided, built, verified, kept and run."""
