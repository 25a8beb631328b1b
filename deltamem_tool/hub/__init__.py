"""Push adapters and ONNX folders to the Hub, pull them, and write the model card."""
