"""Calls of ``torch.utils.checkpoint``: export inlines what they run, which is marked as a wish to run it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.utils.checkpoint
from torch.fx.traceback import annotate, preserve_node_meta

from graphpart.trace.patches import replaced

_MARK = "graphpart.checkpoint"


@contextmanager
def marked_checkpoints() -> Iterator[None]:
    """While tracing, mark what each call with ``use_reentrant=False`` runs; of nested calls, the outermost counts.

    The function that calls pass through on their way is replaced, not ``checkpoint`` itself: models hold on to that, as
    ``transformers`` does in a ``functools.partial``.
    """
    calls, is_inside = count(), False

    def marked(*_: Any, **__: Any) -> Iterator[None]:
        nonlocal is_inside
        if is_inside:
            yield
            return
        is_inside = True
        try:
            with preserve_node_meta(), annotate({_MARK: next(calls)}):
                yield
        finally:
            is_inside = False

    with replaced(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", marked):
        yield


def checkpoint_of(node: torch.fx.Node) -> str:
    """The call of ``checkpoint`` that an operator was traced in, by its number; empty for none."""
    number = (node.meta.get("custom") or {}).get(_MARK)
    return "" if number is None else f"checkpoint {number}"
