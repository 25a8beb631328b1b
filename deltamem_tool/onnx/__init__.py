"""The stateful model as an ONNX graph: exported with PyTorch (`export`), and run without it (`runtime`).

`contract` defines the files of an ONNX folder and the inputs and outputs of its graph.
"""
