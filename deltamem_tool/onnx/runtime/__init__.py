"""Run an ONNX folder in ONNX Runtime. Nothing here imports PyTorch."""
