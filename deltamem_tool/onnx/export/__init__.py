"""Write a model with a memory as an ONNX folder."""
