"""Measure what a memory costs: speed, peak memory and sizes, compared with the base model and a LoRA.

This module defines the defaults of `deltamem bench`, and imports nothing heavy.
"""

BASE, MEMORY, LORA = "base", "memory", "lora"
MODELS = (BASE, MEMORY, LORA)  # ratios are relative to the first
PYTORCH, ONNX = "pytorch", "onnx"
RUNTIMES = (PYTORCH, ONNX)

PROMPTS = (512,)  # tokens
DECODED = 64  # tokens after the first one
REPEATS = 7
SEGMENT = 32  # tokens per message, if the memory writes by segments
