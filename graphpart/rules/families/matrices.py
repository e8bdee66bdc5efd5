"""Norms of vectors and matrices, and Fourier transforms: what they run along is whole, all else is cut."""

from __future__ import annotations

from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call, Dims, fresh, make_rule
from graphpart.rules.families.reduction import reduce, reduced
from graphpart.rules.families.views import resize
from graphpart.rules.table import Families, family


def norm(call: Call) -> AxisRule | None:
    """``linalg_norm``: over the dimensions given, or all."""
    return reduce(call, adds=False)


def matrix_norm(call: Call) -> AxisRule | None:
    """``linalg_matrix_norm``: over two dimensions, the last ones if none are given."""
    dims = fresh(call.shape("self"))
    gone = tuple(d % len(dims) for d in call.get("dim") or (-2, -1))
    result = reduced(dims, gone, bool(call.get("keepdim", False)))
    return make_rule(call, {"self": [dims]}, [result] * len(call.results))


def weight_norm(call: Call) -> AxisRule | None:
    """``_weight_norm``: one norm an index of its dimension, over all others; -1 is one norm of all."""
    dims = fresh(call.shape("v"))
    dim = call.get("dim", 0)
    magnitudes: Dims = tuple(d if i == dim else () for i, d in enumerate(dims))
    whole = [d[0] for i, d in enumerate(dims) if i != dim]
    results = [dims, magnitudes][: len(call.results)]
    return make_rule(call, {"v": [dims], "g": [magnitudes]}, results, whole=whole)


def transform(call: Call) -> AxisRule | None:
    """Fourier transforms: linear, and whole along what they transform."""
    given = call.get("dim")
    rank = call.rank("self")
    if given is None and "s" in call.names:
        given = (-2, -1) if call.target.split(".")[1].endswith("2") else None
        sizes = call.get("s")
        given = given or range(-len(sizes), 0) if sizes is not None else given
    if given is None:
        given = range(rank) if "n" not in call.names else -1
    dims = sorted({d % rank for d in ([given] if isinstance(given, int) else given)})
    return resize(call, dims)


def shifted(call: Call) -> AxisRule | None:
    """``fft_fftshift``: a roll by half."""
    dims = fresh(call.shape("self"))
    return make_rule(call, {"self": [dims]}, [dims], whole=[dims[i][0] for i in call.axes("dim")], linear="self")


FAMILIES: Families = {
    **family("linalg_norm", "self ord dim keepdim", norm),
    **family("linalg_matrix_norm", "self ord dim keepdim", matrix_norm),
    **family("_weight_norm _weight_norm_interface", "v g dim", weight_norm),
    **family("_fft_r2c _fft_c2r _fft_c2c", "self dim normalization", transform),
    **family("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft", "self n dim norm", transform),
    **family("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2", "self s dim norm", transform),
    **family("fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn", "self s dim norm", transform),
    **family("fft_fftshift fft_ifftshift", "self dim", shifted),
}
