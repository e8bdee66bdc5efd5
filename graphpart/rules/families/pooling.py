"""Poolings: samples and channels cut, and positions where all windows are alike."""

from __future__ import annotations

from collections.abc import Sequence

from graphpart.ir.axes import AxisRule, OperandDim, Window
from graphpart.rules.call import Call, make_rule, names, single
from graphpart.rules.sliding import numbered, per_dim, shared, slide, spatial_rank
from graphpart.rules.table import Families, family


def max_pool(call: Call) -> AxisRule | None:
    """``max_pool``: a window may hang over the edge, where nothing is larger than what it sees."""
    return _with_windows(call, _windows(call), "")


def avg_pool(call: Call) -> AxisRule | None:
    """``avg_pool``: positions are cut along a dimension if all its windows are divided by the same number.

    They are not if padding does not count, or if the last window hangs over more than that (``ceil_mode``).
    """
    spatial = spatial_rank(call.target)
    padding, positions = per_dim(call.get("padding", 0), spatial), call.results[0][-spatial:]
    counts, divisor = call.get("count_include_pad", True), call.get("divisor_override")
    windows: list[Window | None] = []
    for window, p, count in zip(_windows(call), padding, positions, strict=True):
        inside = window.unclipped(0, count)[1] <= window.extent + p
        windows.append(window if divisor or (inside and (counts or not p)) else None)
    return _with_windows(call, windows, "self")


def adaptive_avg_pool(call: Call) -> AxisRule | None:
    """``adaptive_avg_pool``: positions are cut where its windows are of one size, side by side."""
    spatial = spatial_rank(call.target)
    pairs = zip(call.shape("self")[-spatial:], call.results[0][-spatial:], strict=True)
    windows = [
        Window(f"o{i}", extent, extent // count, 0, extent // count) if count and extent % count == 0 else None
        for i, (extent, count) in enumerate(pairs)
    ]
    return _with_windows(call, windows, "self")


def _windows(call: Call) -> list[Window]:
    """The windows of a pooling, as its arguments say."""
    spatial = spatial_rank(call.target)
    size, padding = (per_dim(call.get(name, 0), spatial) for name in ("kernel_size", "padding"))
    dilation = per_dim(call.get("dilation", 1), spatial)
    stride = per_dim(call.get("stride") or size, spatial)
    extents = call.shape("self")[-spatial:]
    return [
        Window(f"o{i}", extents[i], stride[i], -padding[i], dilation[i] * (size[i] - 1) + 1) for i in range(spatial)
    ]


def _with_windows(call: Call, windows: Sequence[Window | None], linear: str) -> AxisRule:
    """The rule of a pooling; dimensions without a window are whole."""
    spatial = len(windows)
    leading = single(names("b", call.rank("self") - spatial))
    after = names("o", spatial)
    dims: list[OperandDim] = [
        slide(window, count, f"i{i}") if window else (f"i{i}",)
        for i, (window, count) in enumerate(zip(windows, call.results[0][-spatial:], strict=True))
    ]
    whole = set(after) - shared(tuple(dims))
    return make_rule(call, {"self": [(*leading, *dims)]}, [(*leading, *single(after))], whole=whole, linear=linear)


ADAPTIVE = f"{numbered('adaptive_avg_pool')} _adaptive_avg_pool2d _adaptive_avg_pool3d"

FAMILIES: Families = {
    **family(numbered("max_pool"), "self kernel_size stride padding dilation ceil_mode", max_pool),
    **family(numbered("avg_pool"), "self kernel_size stride padding ceil_mode count_include_pad divisor_override",
             avg_pool),
    **family(ADAPTIVE, "self output_size", adaptive_avg_pool),
}  # fmt: skip
