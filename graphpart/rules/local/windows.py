"""Local calls of operators that look through windows or work on groups: paddings, sizes and groups follow the tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from graphpart.ir.axes import Window
from graphpart.ir.graph import DTYPE_BYTES
from graphpart.rules.local.cut import CutCall, LocalCall, Localize, each
from graphpart.rules.sliding import numbered, per_dim, spatial_rank


def convolved(cut: CutCall) -> LocalCall:
    """Convolutions: a bias goes with the first channels; groups and paddings are the tile's."""
    changed: dict[str, Any] = {}
    if "g" in cut.tile:
        changed["groups"] = len(cut.tile["g"])
    if "c" in cut.tile and 0 not in cut.tile["c"] and len(cut.operands) == 3:
        changed["bias"] = None
    call = _padded(cut, len(cut.operands[1].dims) - 2, 0.0, changed)
    return replace(call, operands=(0, 1)) if "bias" in changed else call


def pooled_largest(cut: CutCall) -> LocalCall:
    """``max_pool``: nothing is smaller than its padding."""
    dtype = cut.op.results[0].dtype
    if dtype.startswith("int"):
        return _padded(cut, spatial_rank(cut.op.target), -(2 ** (8 * DTYPE_BYTES[dtype] - 1)), {})
    return _padded(cut, spatial_rank(cut.op.target), 0 if dtype.startswith("uint") else float("-inf"), {})


def pooled_mean(cut: CutCall) -> LocalCall:
    """``avg_pool``: padding counts, or there is none."""
    return _padded(cut, spatial_rank(cut.op.target), 0.0, {})


def resized(cut: CutCall) -> LocalCall:
    """Adaptive poolings and upsamplings: the size asked for is the tile's."""
    if cut.get("output_size") is None:  # scales are given, and hold for parts
        return cut.call()
    return cut.call(output_size=list(cut.results[0].shape[-spatial_rank(cut.op.target) :]))


def normalized(cut: CutCall) -> LocalCall:
    """``group_norm``: as many groups as the tile has."""
    groups = len(cut.tile["g"]) if "g" in cut.tile else cut.rule.extents["g"]
    if "num_groups" in cut.names:
        return cut.call(num_groups=groups)
    samples, channels, *positions = cut.results[0].shape
    return cut.call(N=samples, C=channels, HxW=prod(positions), group=groups)


def _padded(cut: CutCall, spatial: int, fill: float, changed: Mapping[str, Any]) -> LocalCall:
    """The call on its first operand padded by what the tile's windows hang over its edges.

    Dimensions that are not cut keep the padding of the whole call, unless it was given in words.
    """
    dims = cut.rule.operands[0][-spatial:]
    local = [isinstance(dim, Window) and dim.axis in cut.tile for dim in dims]
    if not any(local):
        return cut.call(**changed)
    given = cut.get("padding", 0)
    if isinstance(given, str):
        local = [True] * spatial
    kept = (0,) * spatial if isinstance(given, str) else per_dim(given, spatial)
    amounts = [amount for i in reversed(range(spatial)) for amount in (_overhang(cut, dims[i]) if local[i] else (0, 0))]
    call = cut.call(**changed, padding=[0 if own else amount for own, amount in zip(local, kept, strict=True)])
    target = call.target.removesuffix(".padding") + ".default" if isinstance(given, str) else call.target
    if not any(amounts):
        return replace(call, target=target)
    return replace(call, target="graphpart.padded", args=(target, amounts, fill, *call.args))


def _overhang(cut: CutCall, dim: Any) -> tuple[int, int]:
    """How far a tile's windows reach over either edge of a dimension."""
    assert isinstance(dim, Window)
    runs = cut.tile[dim.axis].runs if dim.axis in cut.tile else ((0, cut.rule.extents[dim.axis]),)
    low, high = dim.unclipped(runs[0][0], runs[-1][1])
    return max(-low, 0), max(high - dim.extent, 0)


LOCAL: Mapping[str, Localize] = {
    **each(f"{numbered('conv')} {numbered('conv_transpose')} convolution", convolved),
    **each(numbered("max_pool"), pooled_largest),
    **each(numbered("avg_pool"), pooled_mean),
    **each(f"{numbered('adaptive_avg_pool')} _adaptive_avg_pool2d _adaptive_avg_pool3d", resized),
    **each(f"{numbered('upsample_nearest')} {numbered('_upsample_nearest_exact')}", resized),
    **each("group_norm native_group_norm", normalized),
}
"""By operator name."""
