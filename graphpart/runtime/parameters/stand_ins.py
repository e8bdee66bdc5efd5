"""Tensors that stand in for parameters which lie elsewhere, so that the model's code meets the right shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphpart.errors import ParameterError, UnsupportedOperatorError
from graphpart.trace.flat import with_attributes
from graphpart.trace.origin import user_line


def without_memory(parameter: nn.Parameter, strides: Sequence[int]) -> nn.Parameter:
    """A parameter of the same sizes, dtype, device and attributes, whose values take no memory and cannot be read.

    Args:
        parameter: the parameter.
        strides: those that it shall have.
    """
    blank = torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)
    blank.untyped_storage().resize_(0)
    return with_attributes(nn.Parameter(blank, parameter.requires_grad), parameter)


def check_unchanged(module: nn.Module, blanks: Mapping[str, Tensor]) -> None:
    """Refuse what has changed parameters while others stood in for them.

    Args:
        module: the model.
        blanks: the stand-ins, by name.

    Raises:
        ParameterError: naming the parameter.
    """
    now = dict(module.named_parameters(remove_duplicate=False))
    for name, blank in blanks.items():
        if now.get(name) is not blank or blank.untyped_storage().size() or blank.grad is not None:
            raise ParameterError(
                f"forward changes the parameter {name!r}, which lies on other devices meanwhile (several processes or "
                "GPUs); change it outside of forward"
            )


class NoValues(TorchDispatchMode):
    """Inside, an operator that would read a stand-in's values is refused, which torch itself does not always do."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """TorchDynamo follows calls all the same."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if any(isinstance(x, Tensor) and _is_blank(x) for x in pytree.tree_leaves(given)) and not _is_view(func):
            raise UnsupportedOperatorError(
                f"{user_line() or func}: reads values of a parameter where the call is no graph, but parameters lie on "
                "several processes or GPUs. Take that out of forward, or keep it in a graph"
            )
        return func(*args, **(kwargs or {}))


def _is_blank(tensor: Tensor) -> bool:
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return is_plain and tensor.numel() > 0 and not tensor.is_meta and tensor.untyped_storage().size() == 0


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
