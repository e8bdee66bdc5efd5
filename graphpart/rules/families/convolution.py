"""Convolutions: samples, groups, channels of both sides and, unless transposed, positions are cut."""

from __future__ import annotations

from graphpart.ir.axes import AxisRule, OperandDim, Window
from graphpart.rules.call import Call, Dim, make_rule, names, single
from graphpart.rules.sliding import per_dim, shared, slide
from graphpart.rules.table import Families, family


def convolution(call: Call) -> AxisRule | None:
    """Convolutions of any rank, ``n (g c) [positions], (g o) c x -> n (g o) positions``.

    A tile of positions reads what its windows see, halo included; it calls with that padded. A tile of ``g`` has
    groups of its own. Channels ``c`` add up; a bias joins one of the partial results.
    """
    spatial = call.rank("weight") - 2
    inside, kernel, outside = (names(letter, spatial) for letter in "ixo")
    groups = call.get("groups", 1)
    channels: Dim = ("c",) if groups == 1 else ("g", "c")
    made: Dim = ("o",) if groups == 1 else ("g", "o")
    samples = single("n" * (call.rank("input") - spatial - 1))
    transposed = call.get("transposed", False) or "conv_transpose" in call.target
    positions: tuple[OperandDim, ...] = single(inside) if transposed else _positions(call, inside, outside)
    weight = (channels, ("o",)) if transposed else (made, ("c",))
    return make_rule(
        call,
        {
            "input": [(*samples, channels, *positions)],
            "weight": [(*weight, *single(kernel))],
            "bias": [(made,)],
        },
        [(*samples, made, *single(outside))],
        extents={} if groups == 1 else {"g": groups},
        sums=["c"],
        whole=set(outside) - shared(positions),
        linear="input+bias weight+bias",
    )


def _positions(call: Call, inside: tuple[str, ...], outside: tuple[str, ...]) -> tuple[OperandDim, ...]:
    count = len(outside)
    sizes = call.shape("weight")[2:]
    stride, dilation = (per_dim(call.get(name, 1), count) for name in ("stride", "dilation"))
    spans = [d * (size - 1) + 1 for d, size in zip(dilation, sizes, strict=True)]
    padding = call.get("padding", 0)
    if isinstance(padding, str):  # "same" puts the smaller half in front
        before = tuple((span - 1) // 2 if padding == "same" else 0 for span in spans)
    else:
        before = per_dim(padding, count)
    extents, results = call.shape("input")[-count:], call.results[0][-count:]
    return tuple(
        slide(Window(outside[i], extents[i], stride[i], -before[i], spans[i]), results[i], inside[i])
        for i in range(count)
    )


FAMILIES: Families = {
    **family("conv1d conv2d conv3d", "input weight bias stride padding dilation groups", convolution),
    **family("convolution", "input weight bias stride padding dilation transposed output_padding groups", convolution),
    **family("conv_transpose1d conv_transpose2d conv_transpose3d",
             "input weight bias stride padding output_padding groups dilation", convolution),
}  # fmt: skip
