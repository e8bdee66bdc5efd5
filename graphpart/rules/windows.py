"""Pooling and resampling: samples and channels cut, positions whole."""

from __future__ import annotations

from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call, make_rule, names, single
from graphpart.rules.family import Families, family, line
from graphpart.rules.notation import bind


def window(call: Call, linear: str = "") -> AxisRule | None:
    """Operators on the last 1, 2 or 3 dimensions; how many, their name tells."""
    spatial = int(next(c for c in call.target if c in "123"))
    leading = single(names("b", call.rank("self") - spatial))
    before, after = names("i", spatial), names("o", spatial)
    results = [(*leading, *single(after))] * len(call.results)
    return make_rule(call, {"self": [(*leading, *single(before))]}, results, whole=after, linear=linear)


def linear_window(call: Call) -> AxisRule | None:
    """Those of them that are linear."""
    return window(call, "self")


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


def _numbered(stem: str) -> str:
    return " ".join(f"{stem}{d}d" for d in "123")


MAX = " ".join(
    [
        _numbered("max_pool"),
        " ".join(f"max_pool{d}d_with_indices" for d in "123"),
        _numbered("adaptive_max_pool"),
    ]
)
AVERAGE = " ".join([_numbered("avg_pool"), _numbered("adaptive_avg_pool"), "_adaptive_avg_pool2d _adaptive_avg_pool3d"])
UPSAMPLE = " ".join(
    [
        _numbered("upsample_nearest"),
        _numbered("_upsample_nearest_exact"),
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d",
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    ]
)

FAMILIES: Families = {
    **family(MAX, "self", window),
    **family(AVERAGE, "self", linear_window),
    **family(UPSAMPLE, "self output_size", linear_window),
    **family(" ".join(f"{name}.vec" for name in UPSAMPLE.split()), "self output_size", linear_window),
    **family("reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
             "self padding", linear_window),
    **family("pixel_shuffle", "self upscale_factor", shuffle),
    **family("pixel_unshuffle", "self downscale_factor", unshuffle),
    **family("im2col", "self kernel_size dilation padding stride", columns),
    **line("grid_sampler grid_sampler_2d", "input grid", "n c h w, n y x two -> n c y x"),
    **line("grid_sampler_3d", "input grid", "n c d h w, n z y x three -> n c z y x"),
}  # fmt: skip
