"""All that can be seen of a model from outside, as plain values that outlive it, and how two such views differ."""

from __future__ import annotations

import itertools
import random
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tests.helpers import state_effects, state_values

_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""What each module has: hooks, and the dictionaries that parameters and buffers are read from."""


def seen(net: nn.Module, loss: Any) -> dict[str, Any]:
    """Parameters, gradients, buffers, Python state, flags, random streams and modes."""
    found: dict[str, Any] = {}
    for name, parameter in net.named_parameters():
        found[f"parameter {name}"] = plain(parameter)
    for name, buffer in net.named_buffers():
        found[f"buffer {name}"] = plain(buffer)
    found["saved"] = sorted(net.state_dict())
    for name, module in net.named_modules():
        found[f"flags {name}"] = (type(module).__name__, module.training)
        for key, value in vars(module).items():
            if key not in _OF_TORCH:
                found[f"state {name}.{key}"] = plain(value)
    found["loss function"] = plain(vars(loss)) if not isinstance(loss, nn.Module) else _module(loss)
    found["globals"] = (state_effects.TICKS, plain(state_values.HELD), plain(vars(state_values.ELSEWHERE).get("value")))
    found["random"] = hash(random.getstate())
    found["numpy random"] = hash(np.random.get_state()[1].tobytes()) + int(np.random.get_state()[2])
    found["torch random"] = hash(torch.get_rng_state().numpy().tobytes())
    found["modes"] = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype())
    return found


def plain(value: Any, depth: int = 0) -> Any:
    """A value as what can be compared later."""
    if isinstance(value, FakeTensor):
        return "a fake tensor"
    if isinstance(value, Tensor):
        gradient = value.grad if value.is_leaf and value.requires_grad else None
        # What a fused step leaves has no graph any more, so that only leaves are asked whether they want a gradient.
        wants = value.is_leaf and value.requires_grad
        return ("tensor", value.detach().clone(), wants, None if gradient is None else gradient.clone())
    if depth > 6:
        return "deep"
    if isinstance(value, np.ndarray):
        return ("array", torch.from_numpy(value.copy()))
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, (itertools.count, types.GeneratorType)):
        return repr(value) if isinstance(value, itertools.count) else value.gi_frame and value.gi_frame.f_lasti
    if isinstance(value, nn.Module):
        return _module(value)
    if isinstance(value, Mapping):
        return (type(value).__name__, [(plain(k, depth + 1), plain(v, depth + 1)) for k, v in value.items()])
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, sorted(map(repr, value)))
    if isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        return (type(value).__name__, [plain(v, depth + 1) for v in value])
    if isinstance(value, types.FunctionType):
        cells = [plain(c.cell_contents, depth + 1) for c in value.__closure__ or ()]
        return (value.__qualname__, plain(value.__defaults__, depth + 1), cells, plain(vars(value), depth + 1))
    if hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        return (type(value).__name__, plain(vars(value), depth + 1))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)):
        return (type(value).__name__, value)
    return type(value).__name__


def _module(module: nn.Module) -> Any:
    """A module that is none of the model's."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    own = {key: plain(value, 4) for key, value in vars(module).items() if key not in _OF_TORCH}
    return (type(module).__name__, plain(tensors, 4), sorted(own), list(own.values()))


def differences(expected: Mapping[str, Any], found: Mapping[str, Any], tolerance: float) -> list[str]:
    """What differs, by name; tensors and numbers may differ by rounding."""
    wrong = [f"{name} is there or not" for name in sorted(expected.keys() ^ found.keys())]
    for name in expected.keys() & found.keys():
        why = _difference(expected[name], found[name], tolerance)
        if why:
            wrong.append(f"{name}: {why}")
        if "fake tensor" in str(found[name])[:200]:
            wrong.append(f"{name}: a fake tensor")
    return sorted(wrong)


def _difference(expected: Any, found: Any, tolerance: float) -> str:
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        if expected.dtype != found.dtype or expected.shape != found.shape:
            return f"{found.dtype} {tuple(found.shape)} for {expected.dtype} {tuple(expected.shape)}"
        if not expected.numel() or torch.equal(expected, found):
            return ""
        if not expected.is_floating_point():
            return f"{found.tolist()} for {expected.tolist()}"
        scale = max(1.0, float(torch.nan_to_num(expected.abs(), nan=0.0, posinf=0.0).max()))
        close = torch.isclose(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
        error = float((expected - found).abs().max())
        return "" if bool(close.all()) else f"differs by {error:.3g} of {float(expected.abs().max()):.3g}"
    if type(expected) is not type(found):
        return f"{found!r} for {expected!r}"[:300]
    if isinstance(expected, (list, tuple)):
        if len(expected) != len(found):
            return f"{found!r} for {expected!r}"[:300]
        return next((why for e, f in zip(expected, found, strict=True) if (why := _difference(e, f, tolerance))), "")
    if isinstance(expected, float):
        is_same = expected == found or abs(expected - found) <= tolerance * max(1.0, abs(expected))
        return "" if is_same or expected != expected else f"{found!r} for {expected!r}"
    return "" if expected == found else f"{found!r} for {expected!r}"[:300]
