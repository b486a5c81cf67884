"""Checkpoints with ONNX graphs beside their weights, for `from_pretrained(..., engine="onnxruntime")`."""
