"""The stateful model as an ONNX graph: written with PyTorch (`export`), run without it (`runtime`)."""
