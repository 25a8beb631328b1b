"""Export a model with a memory as an ONNX folder. Start with `export.export_onnx`."""
