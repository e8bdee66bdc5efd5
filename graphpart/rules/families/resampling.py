"""Resampling, and poolings without windows of one size: samples and channels cut, positions whole or by blocks."""

from __future__ import annotations

from math import prod

from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call, Dim, make_rule, names, single
from graphpart.rules.notation import bind
from graphpart.rules.sliding import numbered, per_dim, spatial_rank
from graphpart.rules.table import Families, family, line


def window(call: Call, linear: str = "") -> AxisRule | None:
    """Operators on the last dimensions whose positions may look at any others."""
    spatial = spatial_rank(call.target)
    leading = single(names("b", call.rank("self") - spatial))
    before, after = names("i", spatial), names("o", spatial)
    results = [(*leading, *single(after))] * len(call.results)
    return make_rule(call, {"self": [(*leading, *single(before))]}, results, whole=after, linear=linear)


def linear_window(call: Call) -> AxisRule | None:
    """Those of them that are linear."""
    return window(call, "self")


def upsample_nearest(call: Call) -> AxisRule | None:
    """``upsample_nearest``: a position becomes (position, copies) where the scale is a whole number."""
    spatial = spatial_rank(call.target)
    leading = single(names("b", call.rank("self") - spatial))
    before = names("i", spatial)
    after: list[Dim] = []
    extents: dict[str, int] = {}
    for i, scale in enumerate(_scales(call, spatial)):
        after.append((before[i], f"r{i}") if scale else (f"o{i}",))
        extents |= {f"r{i}": scale} if scale else {}
    whole = {axis for dim in after for axis in dim} - set(before)
    operand = (*leading, *single(before))
    return make_rule(call, {"self": [operand]}, [(*leading, *after)], extents=extents, whole=whole, linear="self")


def _scales(call: Call, spatial: int) -> list[int]:
    """Per dimension, its scale; 0 where that is no whole number."""
    letters = "dhw"[3 - spatial :] if spatial > 1 else ("",)
    given = call.get("scale_factors") or [call.get(f"scales_{x}" if x else "scales") for x in letters]
    found = []
    for scale, extent, size in zip(given, call.shape("self")[-spatial:], call.results[0][-spatial:], strict=True):
        ratio = size // extent if extent and size % extent == 0 else 0
        found.append(ratio if scale is None or scale == ratio else 0)
    return found


def shuffle(call: Call) -> AxisRule | None:
    """``pixel_shuffle``: channels ``(c p q)`` move into positions ``(h p)`` and ``(w q)``."""
    factor = call.get("upscale_factor")
    line = "... (c p q) h w -> ... c (h p) (w q)"
    return bind(call, line, whole="p q", linear="self", extents={"p": factor, "q": factor})


def unshuffle(call: Call) -> AxisRule | None:
    """``pixel_unshuffle``: the reverse."""
    factor = call.get("downscale_factor")
    line = "... c (h p) (w q) -> ... (c p q) h w"
    return bind(call, line, whole="p q", linear="self", extents={"p": factor, "q": factor})


def columns(call: Call) -> AxisRule | None:
    """``im2col``: channels ``c`` become ``(c x y)``, positions stay whole."""
    height, width = call.get("kernel_size")
    batch = "n " if call.rank("self") == 4 else ""
    line = f"{batch}c h w -> {batch}(c x) l"
    return bind(call, line, whole="x h w l", linear="self", extents={"x": height * width})


# These give positions of what they found, counted over the whole operand.
LARGEST = " ".join([*(f"max_pool{d}d_with_indices" for d in "123"), numbered("adaptive_max_pool")])
NEAREST = f"{numbered('upsample_nearest')} {numbered('_upsample_nearest_exact')}"
UPSAMPLE = " ".join(
    [
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d",
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    ]
)


def fold(call: Call) -> AxisRule | None:
    """``col2im``: channels ``(c k)`` become ``c``, positions are whole."""
    kernel = prod(per_dim(call.get("kernel_size"), 2))
    leading = "n " if call.rank("self") == 3 else ""
    return bind(call, f"{leading}(c k) l -> {leading}c h w", whole="k l h w", linear="self", extents={"k": kernel})


FAMILIES: Families = {
    **family(LARGEST, "self", window),
    **family("upsample_nearest1d _upsample_nearest_exact1d", "self output_size scales", upsample_nearest),
    **family("upsample_nearest2d _upsample_nearest_exact2d", "self output_size scales_h scales_w", upsample_nearest),
    **family("upsample_nearest3d _upsample_nearest_exact3d", "self output_size scales_d scales_h scales_w",
             upsample_nearest),
    **family(" ".join(f"{name}.vec" for name in NEAREST.split()), "self output_size scale_factors", upsample_nearest),
    **family(UPSAMPLE, "self output_size", linear_window),
    **family(" ".join(f"{name}.vec" for name in UPSAMPLE.split()), "self output_size", linear_window),
    **family("reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
             "self padding", linear_window),
    **family("pixel_shuffle", "self upscale_factor", shuffle),
    **family("pixel_unshuffle", "self downscale_factor", unshuffle),
    **family("col2im", "self output_size kernel_size dilation padding stride", fold),
    **family("im2col", "self kernel_size dilation padding stride", columns),
    **line("grid_sampler grid_sampler_2d", "input grid", "n c h w, n y x two -> n c y x"),
    **line("grid_sampler_3d", "input grid", "n c d h w, n z y x three -> n c z y x"),
}  # fmt: skip
