"""Conversations with a memory, in PyTorch or ONNX Runtime. Only `torch_engine` needs torch.

Start with `conversation.Conversation` and `engine.Engine`, the interface that it needs from a runtime.
"""
