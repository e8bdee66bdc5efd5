"""From what a user writes on the command line to a model with example arguments."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from graphpart.cli.presets import PRESETS
from graphpart.errors import ModelError

IMAGE_SIZE = 224
MOST_TOKENS = 512
_SHAPE = re.compile(r"\d+(x\d+)*")
_INPUT = re.compile(r"(\d+(?:x\d+)*)(?::(\w+))?")
_TOKEN_LABELS = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")


@dataclass(frozen=True)
class Example:
    """A model and arguments to call it with.

    Attributes:
        model: the model, in training mode.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load_example(
    name: str,
    *,
    batch: str = "",
    inputs: Sequence[str] = (),
    dtype: str = "float32",
    config: str | Path | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Example:
    """Build a model by name, with random weights and generated arguments; nothing is downloaded.

    Args:
        name: a preset such as ``gpt2``; ``hf:LlamaForCausalLM``, a class of transformers; or ``file.py:factory`` (also
            ``package.module:factory``), a function that gives a model, or a model with args and kwargs.
        batch: ``8x2048``, samples and tokens, or ``8``, samples.
        inputs: shapes of positional arguments, such as ``8x3x224x224`` or ``8x128:int64``.
        dtype: of parameters and floating-point arguments.
        config: JSON file with the configuration of a ``hf:`` model.
        device: ``meta`` builds presets and ``hf:`` models without memory; a factory decides for itself.
        seed: of weights and arguments.

    Raises:
        ModelError: if there is no such model or it can't be built; the message says what to write instead.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ModelError(f"{dtype!r} is no floating-point dtype; write float32, bfloat16, float16 or float64")
    torch.manual_seed(seed)
    if name in PRESETS or name.startswith("hf:"):
        class_name, values = PRESETS.get(name, (name.removeprefix("hf:"), {}))
        with torch.device(device):
            model = _transformers_model(class_name, values, config).to(kind).train()
            example = Example(model, (), _generated(model, batch))
        return _with_inputs(example, inputs, kind, device) if inputs else example
    if ":" not in name:
        known = ", ".join(sorted(PRESETS))
        raise ModelError(
            f"there is no model {name!r}; write one of {known}, hf:CLASS for a class of transformers, or "
            "file.py:factory for a function of your own"
        )
    if batch:
        raise ModelError("--batch is for presets and hf: models; give the shapes of a factory's model with --input")
    example = _from_factory(name)
    if dtype != "float32":
        example.model.to(kind)
    return _with_inputs(example, inputs, kind, "cpu") if inputs else example


def _transformers_model(class_name: str, values: Mapping[str, Any], config: str | Path | None) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError("this model needs transformers: pip install 'graphpart[models]'") from error
    transformers.logging.set_verbosity_error()  # its warnings are about configurations, which are given here
    found: Any = getattr(transformers, class_name, None)
    if getattr(found, "config_class", None) is None:
        raise ModelError(f"transformers has no model class {class_name!r}; write for instance hf:LlamaForCausalLM")
    try:
        made = found.config_class.from_json_file(str(config)) if config else found.config_class(**values)
    except OSError as error:
        raise ModelError(f"cannot read the configuration {str(config)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{str(config)!r} is no configuration of {class_name}: {error}") from error
    if hasattr(made, "use_cache"):
        made.use_cache = False
    return found(made)


def _generated(model: nn.Module, batch: str) -> dict[str, Tensor]:
    """Random arguments for a transformers model, on the current device."""
    if batch and not _SHAPE.fullmatch(batch):
        raise ModelError(f"cannot read the batch {batch!r}; write samples and tokens as in 8x2048, or samples as in 8")
    sizes = [int(n) for n in batch.split("x")] if batch else [8]
    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    if "pixel_values" in names:
        if len(sizes) > 1:
            raise ModelError(f"the batch {batch!r} has {len(sizes)} sizes; images need one, the number of samples")
        size = getattr(config, "image_size", IMAGE_SIZE)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        found = {"pixel_values": torch.rand(sizes[0], config.num_channels, height, width, dtype=_dtype(model))}
    elif "input_ids" in names and isinstance(getattr(config, "vocab_size", None), int):
        if len(sizes) > 2:
            raise ModelError(f"the batch {batch!r} has {len(sizes)} sizes; text needs two, samples and tokens")
        most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or MOST_TOKENS
        tokens = sizes[1] if len(sizes) > 1 else min(most, MOST_TOKENS)
        found = {"input_ids": torch.randint(config.vocab_size, (sizes[0], tokens))}
    else:
        raise ModelError(f"{type(model).__name__} takes neither tokens nor images; give its arguments with --input")
    if "labels" in names and type(model).__name__.endswith(_TOKEN_LABELS) and "input_ids" in found:
        found["labels"] = found["input_ids"].clone()
    elif "labels" in names and "Classification" in type(model).__name__:
        found["labels"] = torch.randint(config.num_labels, (sizes[0],))
    return found


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)


def _with_inputs(example: Example, inputs: Sequence[str], dtype: torch.dtype, device: str) -> Example:
    """The model with generated positional arguments instead of its own."""
    config = getattr(example.model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    args = []
    for text in inputs:
        match = _INPUT.fullmatch(text)
        kind = getattr(torch, match[2], None) if match and match[2] else dtype
        if not match or not isinstance(kind, torch.dtype):
            raise ModelError(f"cannot read the input {text!r}; write a shape as in 8x3x224x224, or 8x128:int64")
        shape = tuple(int(n) for n in match[1].split("x"))
        if kind.is_floating_point:
            args.append(torch.randn(shape, device=device).to(kind))
        else:
            args.append(torch.randint(vocabulary if isinstance(vocabulary, int) else 2, shape, device=device).to(kind))
    return Example(example.model, tuple(args), {})


def _from_factory(name: str) -> Example:
    place, _, function = name.rpartition(":")
    module = _module(place)
    factory = getattr(module, function, None)
    if not callable(factory):
        raise ModelError(f"{place!r} has no function {function!r}")
    made = factory()
    parts = made if isinstance(made, (tuple, list)) else (made,)
    model, args, kwargs = [*parts, *((), {})[len(parts) - 1 :]] if 1 <= len(parts) <= 3 else (None, (), {})
    if isinstance(args, Mapping) and len(parts) == 2:
        args, kwargs = (), args
    if isinstance(args, Tensor):
        args = (args,)
    if not isinstance(model, nn.Module) or not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise ModelError(f"{name} gives {_kinds(parts)}, not a model, (model, args) or (model, args, kwargs)")
    return Example(model, tuple(args), dict(kwargs))


def _kinds(parts: Sequence[Any]) -> str:
    return ", ".join(type(part).__name__ for part in parts) or "nothing"


def _module(place: str) -> ModuleType:
    """The module at a path or of a dotted name; its folder can be imported from, as for a script."""
    path = Path(place)
    try:
        if path.suffix != ".py":
            sys.path.insert(0, "")
            return importlib.import_module(place)
        if not path.is_file():
            raise ModelError(f"there is no file {place!r}")
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise ModelError(f"cannot import {place!r}: {error}") from error
