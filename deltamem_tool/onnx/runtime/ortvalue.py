"""Convert tensors between ONNX Runtime and NumPy, on any device. bfloat16, which NumPy lacks, becomes uint16."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime import OrtValue

from deltamem_tool.onnx import contract

ELEMENT_TYPES = {contract.FLOAT32: 1, contract.FLOAT16: 10, contract.BFLOAT16: 16}  # of onnx.TensorProto
_CPU = "cpu"


def to_device(array: NDArray[Any], dtype: str, device: str) -> OrtValue:
    """Copy `array` to a new tensor on `device`. bfloat16 is passed as uint16."""
    if dtype != contract.BFLOAT16:
        return OrtValue.ortvalue_from_numpy(np.array(array, order="C"), device)
    here = OrtValue.ortvalue_from_numpy_with_onnx_type(np.array(array, order="C"), ELEMENT_TYPES[dtype])
    return here if device == _CPU else _copy_to(here, device)


def wrap_array(array: NDArray[Any], dtype: str) -> OrtValue:
    """Return a CPU tensor that shares the memory of `array`, which must be contiguous. bfloat16 is passed as uint16."""
    if dtype != contract.BFLOAT16:
        return OrtValue.ortvalue_from_numpy(array)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(array, ELEMENT_TYPES[dtype])


def to_numpy(value: OrtValue) -> NDArray[Any]:
    """Return the values as a read-only array, uint16 for bfloat16. On the CPU, they are not copied."""
    if value.element_type() != ELEMENT_TYPES[contract.BFLOAT16]:
        return np.asarray(value.numpy())
    here = value if value.device_name() == _CPU else _copy_to(value, _CPU)
    count = here.tensor_size_in_bytes()
    if count == 0:
        return np.zeros(here.shape(), np.uint16)
    bits = ctypes.string_at(here.data_ptr(), count)
    return np.frombuffer(bits, np.uint16).reshape(here.shape())


def _copy_to(value: OrtValue, device: str) -> OrtValue:
    copy = OrtValue.ortvalue_from_shape_and_type(value.shape(), value.element_type(), device)
    onnxruntime.copy_tensors([value], [copy])
    return copy


def copy_tensor(value: OrtValue) -> OrtValue:
    """Copy a tensor to a new one on the same device, where `copy_tensors` would not copy."""
    copy = OrtValue.ortvalue_from_shape_and_type(value.shape(), value.element_type(), value.device_name())
    copy.update_inplace(value)
    return copy
