"""ONNX Runtime's execution providers by the names of this package, and the CUDA libraries that they need."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import onnxruntime

from deltamem_tool.errors import ExportError

# By the device of the provider's tensors, as OrtValue names it.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Without the first option, float32 products, including those of the memory, would be rounded to TensorFloat-32.
OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}
_CUDA_LIBRARY = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"


def execution_providers(name: str) -> list[str]:
    """Return the providers to request from ONNX Runtime.

    Raises:
        ExportError: there is no such provider, this build lacks it, or a library that it needs cannot be loaded.
    """
    if name not in PROVIDERS:
        raise ExportError(f"There is no provider {name!r}.", "", f"The providers are {', '.join(PROVIDERS)}.")
    available = onnxruntime.get_available_providers()
    if PROVIDERS[name] not in available:
        raise _unavailable_error(
            name,
            f"This build of ONNX Runtime has {', '.join(available)}.",
            "Install onnxruntime-gpu, or run on the CPU." if name == "cuda" else "Install onnxruntime again.",
        )
    if name == "cuda":
        _load_cuda()
    return [PROVIDERS[name]] if name == "cpu" else [PROVIDERS[name], PROVIDERS["cpu"]]


def check_provider(name: str, available: Sequence[str]) -> None:
    """Check that a session has the provider `name`. ONNX Runtime continues without it, with a line on stderr.

    Raises:
        ExportError: the provider is not in `available`.
    """
    if PROVIDERS[name] not in available:
        raise _unavailable_error(
            name,
            "Its libraries are installed, but it found no usable device. ONNX Runtime's own message says more.",
            "Check the output of nvidia-smi, or run on the CPU.",
        )


def _load_cuda() -> None:
    """Load CUDA's libraries, from NVIDIA's pip packages (which PyTorch depends on) or from the system.

    Raises:
        ExportError: a library is missing.
    """
    with redirect_stdout(io.StringIO()):  # it prints every library that it does not find, needed or not
        onnxruntime.preload_dlls(directory="")  # "": do not use PyTorch's libraries, which would import it
    if not _CUDA_LIBRARY.is_file():
        return  # not Linux: check_provider decides
    try:
        ctypes.CDLL(str(_CUDA_LIBRARY))
    except OSError as error:
        if "cannot open shared object file" not in str(error):
            return  # not a missing library: ONNX Runtime reports the problem
        library = str(error).partition(":")[0]
        raise _unavailable_error(
            "cuda",
            f"It needs {library}, which cannot be loaded ({error}).",
            "Install CUDA's libraries (`pip install onnxruntime-gpu[cuda,cudnn]`), or run on the CPU.",
        ) from error


def _unavailable_error(name: str, why: str, next: str) -> ExportError:
    return ExportError(f"ONNX Runtime cannot run on {name} here.", why, next)
