"""A student as ONNX: export, fp16, int8, frozen layers."""
