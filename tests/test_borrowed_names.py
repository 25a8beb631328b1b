"""Only `_compat` uses private names of other libraries, and names that may move."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from inspect import isfunction
from pathlib import Path

import pytest
from helpers.extras import lacks_extra

import deltamem_tool
from deltamem_tool import _compat
from deltamem_tool._compat import BORROWED

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("deltamem_tool", "benchmarks", "recipes") for path in (ROOT / folder).rglob("*.py")
)
LIBRARIES = ("transformers", "torch", "onnxscript", "onnxruntime", "huggingface_hub", "httpx2")
# Documented, and present in every version within the bounds.
PUBLIC = {
    "httpx2",
    "huggingface_hub",
    "huggingface_hub.errors",
    "huggingface_hub.utils",
    "onnxruntime",
    "onnxruntime.quantization.matmul_nbits_quantizer",  # ONNX Runtime documents it
    "torch",
    "onnxscript.optimizer",
    "torch.autograd.function",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.export",
    "torch.nn",
    "torch.nn.functional",
    "torch.overrides",
    "torch.profiler",
    "torch.utils.checkpoint",
    "torch.utils.data",
    "torch.utils.hooks",
    "torch.utils.tensorboard",
    "transformers",
    "transformers.integrations",
    "transformers.utils",
}
# Methods that model classes override, according to the documentation of lm-evaluation-harness.
HARNESS_METHODS = {"_loglikelihood_tokens", "_model_generate"}
PRIVATE = re.compile(r"_[a-z]\w*")


def borrowed_in(source: str) -> list[str]:
    """Private or movable names that a file uses from `LIBRARIES`, as `line: name`."""
    tree = ast.parse(source)
    return sorted({f"{line}: {name}" for line, name in (*_imports(tree), *_arguments(tree), *_attributes(tree))})


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if module.partition(".")[0] in LIBRARIES and (
                module not in PUBLIC or name in BORROWED or (name or "").startswith("_")
            ):
                yield node.lineno, f"{module}.{name}" if name else module


def _arguments(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls, and dictionaries of arguments, that use a name of the cache that only some versions have."""
    old = ("past_key_values", "cache_params")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, keyword.arg) for keyword in node.keywords if keyword.arg in old)
        elif isinstance(node, ast.Dict):
            names = [getattr(key, "value", None) for key in node.keys]
            yield from ((node.lineno, name) for name in names if name in old)


def _attributes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Private attributes, including those in `getattr` and similar, that the package does not define itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
            inherited = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            constant = node.args[1] if len(node.args) > 1 else None
            name, inherited = getattr(constant, "value", None), False
        else:
            continue
        if not isinstance(name, str) or not PRIVATE.fullmatch(name):
            continue
        if name in HARNESS_METHODS or (name in OWN and not inherited):
            continue
        yield node.lineno, name


def _defined() -> set[str]:
    """Private names that the package's own classes and modules define."""
    names = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                names.add(node.attr)
    return {name for name in names if PRIVATE.fullmatch(name)} | {"_exit", "_replace"}  # of os and of named tuples


OWN = _defined()


def _imported() -> set[str]:
    """The names imported from `_compat`."""
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == _compat.__name__]
    return {alias.name for node in imports for alias in node.names}


IMPORTED = _imported()


@pytest.mark.parametrize("name", BORROWED)
def test_every_borrowed_name_is_used(name):
    assert name in IMPORTED


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.name != "_compat.py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_is_borrowed_elsewhere(path):
    assert borrowed_in(path.read_text()) == []


@pytest.mark.slow  # it imports everything
def test_no_private_method_is_overridden():
    overridden = []
    for module in pkgutil.walk_packages(deltamem_tool.__path__, "deltamem_tool."):
        if module.name.endswith("__main__") or lacks_extra(module.name):
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if not isinstance(kind, type) or kind.__module__ != module.name:
                continue
            foreign = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
            private = [name for name, value in vars(kind).items() if PRIVATE.fullmatch(name) and isfunction(value)]
            overridden += [
                f"{kind.__qualname__}.{name}" for name in private if any(name in vars(base) for base in foreign)
            ]
    assert overridden == []


@pytest.mark.parametrize(
    "line",
    [
        "from torch._higher_order_ops.scan import scan",
        "import torch._dynamo",
        "from transformers.cache_utils import DynamicLayer",
        "from transformers import _LazyModule",
        "from onnxruntime.capi.onnxruntime_pybind11_state import Fail",
        "from transformers.integrations import INTEGRATION_TO_CALLBACK",
        "model(ids, past_key_values=cache)",
        "model(ids, **{'past_key_values': cache})",
        "config._attn_implementation",
        "getattr(config, '_commit_hash', None)",
        "super()._apply(fn)",
    ],
)
def test_borrowed_names_are_detected(line):
    assert borrowed_in(line)
