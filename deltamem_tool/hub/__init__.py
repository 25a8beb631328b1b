"""Adapters and ONNX folders on the Hub: what goes there, how it is described, sent, and fetched."""
