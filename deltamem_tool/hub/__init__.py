"""Adapters and ONNX folders on the Hub: push, pull, and the model card."""
