"""Which kernel computes a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from graphpart.runtime.kernels import batch_norm, bridges, cross_entropy
from graphpart.runtime.kernels.strided import STRIDED_KERNELS
from graphpart.runtime.kernels.tile_kernels import TILE_KERNELS
from graphpart.trace.names import resolve

KERNELS: Mapping[str, Callable[..., Any]] = {
    "graphpart.slice": bridges.slice_region,
    "graphpart.concat": bridges.concat,
    "graphpart.sum": bridges.sum_parts,
    "graphpart.split": bridges.split,
    "graphpart.cast": torch.Tensor.to,
    **TILE_KERNELS,
    **STRIDED_KERNELS,
    "graphpart.count_labels": cross_entropy.count_labels,
    "graphpart.logsumexp_part": cross_entropy.logsumexp_part,
    "graphpart.pick_class": cross_entropy.pick_class,
    "graphpart.class_losses": cross_entropy.class_losses,
    "graphpart.centered_squares": batch_norm.centered_squares,
    "graphpart.batch_norm_apply": batch_norm.batch_norm_apply,
    "graphpart.batch_norm_running": batch_norm.batch_norm_running,
    "graphpart.batch_norm_local": batch_norm.batch_norm_local,
    "graphpart.batch_norm_sums": batch_norm.batch_norm_sums,
    "graphpart.batch_norm_update": batch_norm.batch_norm_update,
    "aten._native_batch_norm_legit_functional.default": batch_norm.batch_norm,
}
"""What graphpart's own targets compute, and operators of torch that need more than a plain call."""


def kernel_of(target: str) -> Callable[..., Any]:
    """The callable for a target: one of ours, or the torch operator."""
    return KERNELS[target] if target in KERNELS else resolve(target)
