"""TensorRT: plans decided, built, proved, kept and run."""
