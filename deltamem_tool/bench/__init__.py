"""Measure what a memory costs: speed, peak memory and sizes, compared with the base model and a LoRA.

The defaults of `deltamem bench` are defined here, where nothing heavy is imported.
"""

BASE, MEMORY, LORA = "base", "memory", "lora"
MODELS = (BASE, MEMORY, LORA)  # ratios are to the first
PYTORCH, ONNX = "pytorch", "onnx"
RUNTIMES = (PYTORCH, ONNX)

PROMPTS = (512,)  # tokens
DECODED = 64  # tokens after the first one
REPEATS = 7
SEGMENT = 32  # tokens of a message, where the memory writes by segments
