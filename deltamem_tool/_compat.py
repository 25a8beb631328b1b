"""Names of other libraries that may change without notice: private ones, and those that differ between versions.

The rest of the package imports them from here, so that a release which renames something changes only this file.
Nothing heavy is imported before a name is used.

* `BORROWED` is a table of names that are used as they are: `from deltamem_tool._compat import FakeTensor`.
* The functions below it are for everything that has to be looked up, set or renamed.

This file is written for the versions within the bounds of `pyproject.toml`. `tests/test_compat.py` has a test for every
entry, and fails if one of these names is used elsewhere.
"""

from __future__ import annotations

import functools
import inspect
import io
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

from deltamem_tool.errors import MemoryStateError

# Names used as they are


class Name(NamedTuple):
    """Where a borrowed name lives, why it is needed, and when it can go."""

    module: str
    why: str
    until: str


_NO_PUBLIC = "its library offers the same under a public name"
_EXPORTERS = "transformers.exporters is no longer marked as experimental"
_PYTREE = "torch.utils.pytree, which is documented, is in the lowest torch that we support"
_LAYER = "transformers documents the layers of a cache"
_LOADING = "transformers tells how a checkpoint's weights are named without loading them"

BORROWED: dict[str, Name] = {
    # torch
    "scan": Name("torch._higher_order_ops.scan", "the loop that torch's exporter turns into an ONNX Scan", _NO_PUBLIC),
    "FakeTensor": Name("torch._subclasses.fake_tensor", "tells tensors without numbers from others", _NO_PUBLIC),
    "FakeTensorMode": Name("torch._subclasses.fake_tensor", "runs a training step without numbers", _NO_PUBLIC),
    "TorchDispatchMode": Name("torch.utils._python_dispatch", "counts what every operation allocates", _NO_PUBLIC),
    "tree_leaves": Name("torch.utils._pytree", "the tensors in an operation's result", _PYTREE),
    "tree_map_only": Name("torch.utils._pytree", "copies the tensors of a cache layer", _PYTREE),
    # transformers: layers of a cache
    "DummyLayer": Name("transformers.cache_utils", "a layer that keeps nothing", _LAYER),
    "DynamicIndexedLayer": Name("transformers.cache_utils", "a layer that keeps an indexer's keys too", _LAYER),
    "DynamicLayer": Name("transformers.cache_utils", "a layer whose keys and values grow", _LAYER),
    "DynamicSlidingWindowLayer": Name("transformers.cache_utils", "one that keeps a window of them", _LAYER),
    "LinearAttentionAndFullAttentionLayer": Name(
        "transformers.cache_utils", "a layer that keeps both states and keys", _LAYER
    ),
    "LinearAttentionAndSlidingWindowAttentionLayer": Name(
        "transformers.cache_utils", "one that keeps states and a window of keys", _LAYER
    ),
    "LinearAttentionLayer": Name("transformers.cache_utils", "a layer that keeps states alone", _LAYER),
    "LinearAttentionCacheLayerMixin": Name("transformers.cache_utils", "recurrent or convolutional states", _LAYER),
    "StaticLayer": Name("transformers.cache_utils", "a layer of a fixed length", _LAYER),
    "ACT2FN": Name("transformers.activations", "activations by the names that configs have for them", _NO_PUBLIC),
    "GradientCheckpointingLayer": Name("transformers.modeling_layers", "what a decoder layer is", _LAYER),
    # transformers: checkpoints that are read without loading them
    "get_model_conversion_mapping": Name("transformers.conversion_mapping", "older names of weights", _LOADING),
    "WeightConverter": Name("transformers.core_model_loading", "weights that are put together on loading", _LOADING),
    "WeightRenaming": Name("transformers.core_model_loading", "weights that are only renamed", _LOADING),
    "rename_source_key": Name("transformers.core_model_loading", "applies both to a name on disk", _LOADING),
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": Name(
        "transformers.models.auto.modeling_auto", "the model types that are language models", _NO_PUBLIC
    ),
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": Name(
        "transformers.models.auto.modeling_auto", "the model types that see pictures", _NO_PUBLIC
    ),
    "TENSOR_PROCESSORS": Name(
        "transformers.modeling_gguf_pytorch_utils", "what a GGUF file's weights are rearranged by", _LOADING
    ),
    "GenerationMode": Name("transformers.generation", "which way `generate` decodes", _NO_PUBLIC),
    "Conv1D": Name("transformers.pytorch_utils", "GPT-2's linear layer, whose weight is transposed", _NO_PUBLIC),
    # transformers: the Trainer
    "TRAINER_STATE_NAME": Name("transformers.trainer", "a file of a checkpoint", _NO_PUBLIC),
    "PREFIX_CHECKPOINT_DIR": Name("transformers.trainer_utils", "how a checkpoint's folder begins", _NO_PUBLIC),
    "SAFE_WEIGHTS_NAME": Name("transformers.utils", "a file of a checkpoint", _NO_PUBLIC),
    "PrinterCallback": Name("transformers.trainer_callback", "prints every log; it is removed", _NO_PUBLIC),
    "get_length_grouped_indices": Name("transformers.trainer_pt_utils", "batches of like length", _NO_PUBLIC),
    "OptimizerNames": Name("transformers.training_args", "the optimizers that a recipe can name", _NO_PUBLIC),
    "INTEGRATION_TO_CALLBACK": Name("transformers.integrations", "the loggers that a recipe can name", _NO_PUBLIC),
    # transformers: export
    "OnnxConfig": Name("transformers.exporters", "options of the exporter", _EXPORTERS),
    "OnnxExporter": Name("transformers.exporters", "traces a model, fuses, and writes it", _EXPORTERS),
    "fuse_for_onnxruntime": Name(
        "transformers.exporters.onnxruntime_fusions", "fuses a graph that is not the exporter's own", _EXPORTERS
    ),
    # onnxruntime
    "NotImplemented": Name(
        "onnxruntime.capi.onnxruntime_pybind11_state", "raised where a provider lacks an operator", _NO_PUBLIC
    ),
    # huggingface_hub, and the HTTP client whose errors it raises (huggingface_hub 1 raised those of httpx)
    "RepoFile": Name("huggingface_hub.hf_api", "a file in the listing of a repository", _NO_PUBLIC),
    "git_hash": Name("huggingface_hub.utils.sha", "the Hub's digest of a small file", _NO_PUBLIC),
    "sha_fileobj": Name("huggingface_hub.utils.sha", "the Hub's digest of a large file", _NO_PUBLIC),
    "REGEX_COMMIT_OID": Name("huggingface_hub.constants", "what a commit's id looks like", _NO_PUBLIC),
    "HTTPError": Name("httpx2", "what the Hub's client raises for a connection", "huggingface_hub has one of its own"),
    "TimeoutException": Name("httpx2", "likewise, for one that took too long", "huggingface_hub has one of its own"),
}


def __getattr__(name: str) -> Any:
    if name not in BORROWED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(BORROWED[name].module), name)


# The cache argument: `past_key_values` until transformers 5.23, `cache` from 5.24 on. Which of them a function takes is
# read off its signature, since code that comes with a checkpoint may have kept the old name. Where both are given,
# transformers drops the old one with a warning: a memory would be ignored. Can go with transformers 5.23.

CACHE = "cache"
CACHE_ARGUMENTS = (CACHE, "past_key_values", "cache_params")


def cache_argument(function: Callable[..., Any]) -> str:
    """What `function` calls the cache: what its signature says, else what this transformers' `generate` does."""
    parameters = inspect.signature(function).parameters
    named = next((name for name in CACHE_ARGUMENTS if name in parameters), None)
    return named or generation_cache_argument()


def generation_cache_argument() -> str:
    """What `generate` calls the cache among the arguments of a model."""
    from transformers import GenerationMixin

    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_ARGUMENTS if name in parameters)


def with_one_cache(
    parameters: Sequence[str], argument: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with the cache under the name that is understood there.

    Args:
        parameters: what a function takes, in order.
        argument: what it calls the cache, see `cache_argument`.
        args: the positional arguments of the call; the cache may be one of them.
        kwargs: its keyword arguments; the cache may be under any of its names.

    Raises:
        MemoryStateError: there are two caches.
    """
    renamed = {name: value for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
    caches = {f"{name}=": kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None}
    place = parameters.index(argument) if argument in parameters else len(args)
    if place < len(args) and args[place] is not None:
        caches["one by its place"] = args[place]
    if len(caches) > 1:
        raise MemoryStateError(
            f"Two caches were given: {' and '.join(caches)}.",
            "They are one argument of the model, and only one of the two memories could be used.",
            f"Pass {CACHE}= alone.",
        )
    for cache in caches.values():
        if place < len(args):
            args = (*args[:place], cache, *args[place + 1 :])
        else:
            renamed[argument] = cache
    return args, renamed


# Private attributes


def attention_implementation(config: Any) -> str:
    """Which attention a model of `config` runs: "sdpa", "eager", … Can go when transformers has a public getter."""
    return str(config._attn_implementation)


def commit_of_config(config: Any) -> str | None:
    """The commit on the Hub that `config` was loaded from. Can go when transformers has a public name for it."""
    return getattr(config, "_commit_hash", None)


def without_compilation(model: Any) -> Any:
    """The module that `torch.compile` was given; any other model itself. Can go when torch has a public name for it."""
    return getattr(model, "_modules", {}).get("_orig_mod", model)


def child_of(module: Any, name: str) -> Any:
    """The module called `name` right below `module`, or None. Can go when torch's `get_submodule` is quick."""
    return module._modules.get(name)


def drop_hooks(module: Any, functions: Collection[Any]) -> None:
    """Remove the hooks of `module` that are partial ones of `functions`, wherever they come from.

    torch copies hooks with the modules that they are on, and to the quantised ones that it puts in their place. Can go
    when it removes a hook by its function.
    """
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, functools.partial) and hook.func in functions:
                del hooks[key]


def hooks_of(module: Any) -> list[Any]:
    """What is called before and after the forward of `module`. Can go when torch lists them under a public name."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def accelerate_hooks(module: Any) -> list[Any]:
    """What accelerate does before and after the forward of `module`, to bring it weights and inputs.

    Can go when accelerate lists its hooks under a public name.
    """
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def changes_of(tensors: Iterable[Any]) -> list[tuple[int, int]] | None:
    """What is another than before after one of `tensors` has been written to in place or been given other data.

    None where changes are not counted: of tensors of inference mode. Can go when torch has a public counter.
    """
    try:
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
    except RuntimeError:
        return None


def parameters_of(modules: Iterable[Any]) -> list[Any]:
    """The parameters of `modules`, not of those in them.

    It takes a tenth of the time of torch's `parameters()`. Can go when that is quick.
    """
    parameters = chain.from_iterable([module._parameters.values() for module in modules])
    return [parameter for parameter in parameters if parameter is not None]


# The method of the Trainer that makes the sampler of a training set. Can go when the Trainer takes a sampler.
TRAIN_SAMPLER = "_get_train_sampler"

# The method in which `generate` makes the cache or takes the one it was given: (self, generation_config, model_kwargs,
# generation_mode, batch_size, max_cache_length). Can go when transformers lets a model choose its cache's class.
PREPARE_CACHE = "_prepare_cache_for_generation"

# The method in which `generate` collects what ends a row, after the one above: (self, generation_config,
# stopping_criteria, tokenizer). Can go when `generate` tells a cache which rows have ended.
STOPPING_CRITERIA = "_get_stopping_criteria"


def use_one_gpu(arguments: Any) -> None:
    """Have the Trainer use the first GPU alone.

    DataParallel would copy an adapter, but not the base with its hooks. Can go when transformers has an option for it.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


# Switches


@contextmanager
def _set(module: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


@contextmanager
def without_packing_search() -> Iterator[None]:
    """Keep transformers from looking in the positions for several texts in one row.

    It does so without a mask and a cache, and where positions have no values (on fake tensors) it makes masks for them.
    Can go when an option turns it off.
    """
    from transformers import masking_utils

    with _set(masking_utils, "find_packed_sequence_indices", lambda *_: None):
        yield


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Trace without noting each operation's place in the source, of no use in a graph that leaves this machine.

    Tracing takes a tenth less time. From torch 2.12 on; 2.11 notes them. Can go when torch does not by default.
    """
    from torch.fx import config

    option = "do_not_emit_stack_traces"
    with _set(config, option, True) if hasattr(config, option) else nullcontext():
        yield


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silence the exporters' progress lines (on stdout) and their notes on versions.

    The comparison that follows decides. Can go when transformers' exporter has an option for it.
    """
    from transformers.utils import logging as transformers_logging

    torch_logger = logging.getLogger("torch.onnx")
    level, verbosity = torch_logger.level, transformers_logging.get_verbosity()
    torch_logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def amended_rewrites() -> Iterator[None]:
    """Inside, onnxscript's optimizer does not take small constants for zero, and its time does not grow with n² nodes.

    It drops a sum with a constant of at most 1e-8, and with it the epsilon of some norms: an embedding of zeros is not
    a number then. At each node, it lists the graph for each pattern of several outputs. Can go when neither is so.
    """
    from onnxscript.rewriter import MatchResult, _matcher

    matcher, exact = _matcher.SimplePatternMatcher, lambda a, b, rel_tol, abs_tol: math.isclose(a, b, rel_tol=rel_tol)
    match, other_operator = matcher.match, MatchResult().fail("another operator")

    def match_operator(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        alike = self.pattern.output_nodes[0].op.matches(node.op_type)
        return match(self, model, graph, node, **options) if alike else other_operator

    with _set(_matcher, "math", SimpleNamespace(isclose=exact)), _set(matcher, "match", match_operator):
        yield


@contextmanager
def cached_gguf_reader(reader: Any) -> Iterator[None]:
    """Inside, transformers reads a GGUF file in half the time or less, and with the progress bars of its other files.

    By itself it opens the file anew for the config and for the weights, which takes seconds where the vocabulary is
    large, makes a table of all names for every module of the model, and shows a bar that its own switch does not turn
    off. Can go when it does none of it.

    Args:
        reader: the file, opened by `gguf`.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    names = functools.cache(gguf.get_tensor_name_map)
    with (
        _set(gguf, "GGUFReader", lambda path: reader),
        _set(gguf, "get_tensor_name_map", names),
        _set(modeling_gguf_pytorch_utils, "tqdm", transformers_logging.tqdm),
    ):
        yield


def peft_model(model: Any, config: Any) -> Any:
    """Call `peft.get_peft_model`, which changes `model` in place.

    PEFT 0.21 asks a model of transformers 5 for a property by its old name; can go with it.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the config does not fit the model.
    """
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


@contextmanager
def use_attention(model: Any, name: str) -> Iterator[None]:
    """Inside, `model` attends by the implementation `name`, whatever it says of itself that it supports.

    `set_attn_implementation` asks models first; here it is tried.
    """
    from transformers import PreTrainedModel

    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}.values()
    with ExitStack() as stack:
        for config in configs:
            stack.enter_context(_set(config, "_attn_implementation_internal", name))
        yield
