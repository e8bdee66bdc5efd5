"""In-place operators on values with a gradient: what they write, and every gradient, is eager's.

Tracing turns each into a functional form; some of these have another derivative, or none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import UnsupportedOperatorError
from graphpart.trace import trace

Change = Callable[[Tensor, Tensor], object]
"""Changes its first argument in place, with the help of the second; both are ``[6, 4]`` and have a gradient."""

INDEX = torch.tensor([0, 2, 3, 5])
PLACES = torch.tensor([0, 7, 13, 20])
ROWS = torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2]])
MASK = torch.arange(24).reshape(6, 4) % 3 == 0
HALVES = torch.linspace(-0.9, 0.8, 24).reshape(6, 4)


def _set(index: object, value: Callable[[Tensor], object]) -> Change:
    def change(y: Tensor, z: Tensor) -> None:
        y[index] = value(z)

    return change


def _data_type(dtype: torch.dtype) -> Change:
    return lambda y, z: y.copy_(z.to(dtype))


WRITES: dict[str, Change] = {
    "all": _set(slice(None), lambda z: z),
    "all_number": _set(slice(None), lambda z: 2.0),
    "all_broadcast": _set(..., lambda z: z[0]),
    "all_scalar": _set(..., lambda z: z.sum()),
    "rows": _set(slice(1, 3), lambda z: z[:2]),
    "steps": _set(slice(0, 6, 2), lambda z: z[3:]),
    "column": _set((slice(None), 1), lambda z: z[:, 0]),
    "element": _set((2, 3), lambda z: z[0, 0]),
    "new_axis": _set((None, slice(1, 4)), lambda z: z[:3]),
    "index": _set(INDEX, lambda z: z[:4]),
    "index_broadcast": _set(INDEX, lambda z: z[0]),
    "index_pair": _set((INDEX, torch.tensor([3, 2, 1, 0])), lambda z: z[0]),
    "index_column": _set((slice(None), torch.tensor([0, 2])), lambda z: z[:, :2]),
    "mask": _set(MASK, lambda z: 1.5),
    "mask_scalar": _set(MASK, lambda z: z.sum()),
    "mask_rows": _set(MASK[:, 0], lambda z: z[0]),
    "mask_columns": _set((slice(None), MASK[0]), lambda z: z[:, :1].sum()),
    "copy_": lambda y, z: y.copy_(z),
    "copy_broadcast": lambda y, z: y.copy_(z[:1]),
    "copy_double": _data_type(torch.float64),
    "copy_half": _data_type(torch.bfloat16),
    "fill_": lambda y, z: y.fill_(2.0),
    "fill_tensor": lambda y, z: y.fill_(z.sum()),
    "zero_": lambda y, z: y.zero_(),
    "zero_rows": lambda y, z: y[1:4].zero_(),
    "fill_diagonal_": lambda y, z: y.fill_diagonal_(0.5),
    "fill_diagonal_wrap": lambda y, z: y.fill_diagonal_(0.5, wrap=True),
    "diagonal": lambda y, z: y.diagonal().copy_(z[0]),
    "index_fill_": lambda y, z: y.index_fill_(0, INDEX, 2.0),
    "index_fill_tensor": lambda y, z: y.index_fill_(1, torch.tensor([1]), z.sum()),
    "index_copy_": lambda y, z: y.index_copy_(0, INDEX, z[:4]),
    "index_add_": lambda y, z: y.index_add_(0, INDEX, z[:4], alpha=2),
    "index_put_": lambda y, z: y.index_put_((INDEX,), z[:4]),
    "index_put_add": lambda y, z: y.index_put_((torch.tensor([1, 1, 2]),), z[:3], accumulate=True),
    "masked_fill_": lambda y, z: y.masked_fill_(MASK, 2.0),
    "masked_fill_tensor": lambda y, z: y.masked_fill_(MASK, z.sum()),
    "masked_scatter_": lambda y, z: y.masked_scatter_(MASK, z),
    "put_": lambda y, z: y.put_(PLACES, z[0]),
    "put_add": lambda y, z: y.put_(PLACES, z[0], accumulate=True),
    "scatter_": lambda y, z: y.scatter_(0, ROWS, z[:2]),
    "scatter_value": lambda y, z: y.scatter_(0, ROWS, 2.0),
    "scatter_add_": lambda y, z: y.scatter_add_(0, ROWS, z[:2]),
    "transposed": lambda y, z: y.t().copy_(z.t()),
    "view": lambda y, z: y.view(-1)[::5].copy_(z.reshape(-1)[:5]),
    "narrowed": lambda y, z: y.narrow(1, 1, 2).mul_(z[:, :2]),
    "as_strided": lambda y, z: y.as_strided((3, 2), (8, 1), 1).mul_(z[:3, :2]),
    "unfolded": lambda y, z: y.unfold(0, 2, 2).mul_(2.0),
    "add_": lambda y, z: y.add_(z, alpha=2),
    "sub_": lambda y, z: y.sub_(z),
    "mul_": lambda y, z: y.mul_(z),
    "div_": lambda y, z: y.div_(z.abs() + 1),
    "pow_": lambda y, z: y.pow_(2),
    "neg_": lambda y, z: y.neg_(),
    "addcmul_": lambda y, z: y.addcmul_(z, z, value=0.5),
    "addcdiv_": lambda y, z: y.addcdiv_(z, z.abs() + 1),
    "lerp_": lambda y, z: y.lerp_(z, 0.25),
    "sigmoid_": lambda y, z: y.sigmoid_(),
    "square_": lambda y, z: y.square_(),
    "reciprocal_": lambda y, z: y.add_(9.0).reciprocal_(),
    "triu_": lambda y, z: y.triu_(),
    "tril_": lambda y, z: y.tril_(-1),
    "cumsum_": lambda y, z: y.cumsum_(0),
    "cumprod_": lambda y, z: y.cumprod_(1),
    "addmm_": lambda y, z: y.addmm_(z, z[:4]),
    "addmv_": lambda y, z: y[0].addmv_(z[:4], z[0]),
    "addr_": lambda y, z: y[:4].addr_(z[:4, 0], z[0]),
}
"""Also of complex values."""

REAL: dict[str, Change] = {
    "clamp_": lambda y, z: y.clamp_(-0.5, 0.5),
    "clamp_tensor": lambda y, z: y.clamp_(min=z),
    "clamp_min_": lambda y, z: y.clamp_min_(0.1),
    "copysign_": lambda y, z: y.copysign_(z),
    "relu_": lambda y, z: y.relu_(),
    "threshold_": lambda y, z: nn.functional.threshold_(y, 0.1, 7.0),
    "leaky_relu_": lambda y, z: nn.functional.leaky_relu_(y, 0.2),
    "elu_": lambda y, z: nn.functional.elu_(y),
    "silu_": lambda y, z: nn.functional.silu(y, inplace=True),
    "hardtanh_": lambda y, z: nn.functional.hardtanh_(y),
    "exp_": lambda y, z: y.exp_(),
    "log_": lambda y, z: y.abs_().add_(1.0).log_(),
    "sqrt_": lambda y, z: y.square_().add_(1.0).sqrt_(),
    "tanh_": lambda y, z: y.tanh_(),
    "abs_": lambda y, z: y.abs_(),
    "sign_": lambda y, z: y.sign_(),
    "round_": lambda y, z: y.round_(),
    "floor_": lambda y, z: y.floor_(),
    "frac_": lambda y, z: y.frac_(),
    "trunc_": lambda y, z: y.trunc_(),
    "fmod_": lambda y, z: y.fmod_(0.3),
    "remainder_": lambda y, z: y.remainder_(0.3),
    "atan2_": lambda y, z: y.atan2_(z),
    "hypot_": lambda y, z: y.hypot_(z),
    "xlogy_": lambda y, z: y.xlogy_(z.abs() + 1),
    "nan_to_num_": lambda y, z: y.nan_to_num_(),
    "lgamma_": lambda y, z: y.abs_().add_(1.0).lgamma_(),
    "renorm_": lambda y, z: y.renorm_(2, 0, 1.0),
    "scatter_reduce_": lambda y, z: y.scatter_reduce_(0, ROWS, z[:2], "amax"),
    "scatter_reduce_mean": lambda y, z: y.scatter_reduce_(0, ROWS, z[:2], "mean", include_self=False),
    "index_reduce_": lambda y, z: y.index_reduce_(0, INDEX, z[:4], "amax"),
    "complex_into_real": lambda y, z: y.copy_(torch.complex(z, z).real),
    "mixed_dtype_add": lambda y, z: y.add_(z.double()),
}
COMPLEX: dict[str, Change] = {
    "real": lambda y, z: y.real.copy_(z.imag),
    "imag": lambda y, z: y.imag.mul_(z.real),
    "set_real": lambda y, z: setattr(y, "real", z.real),
    "real_source": lambda y, z: y.copy_(z.real),
    "real_rows": _set(slice(1, 3), lambda z: z[:2].real),
    "view_as_real": lambda y, z: torch.view_as_real(y)[..., 0].mul_(z.real),
    "conj_": lambda y, z: y.conj_physical_(),
    "conj_view": lambda y, z: y.conj().copy_(z),
    "exp_": lambda y, z: y.exp_(),
    "sgn_": lambda y, z: y.sgn_(),
    "real_index": _set(INDEX, lambda z: z[:4].real.to(z.dtype)),
}
REAL_ONLY = ("copy_half", "copy_double")
KINDS = {
    "real": (torch.float32, {**WRITES, **REAL}),
    "complex": (torch.complex64, {**{k: v for k, v in WRITES.items() if k not in REAL_ONLY}, **COMPLEX}),
}
QUICK = ("copy_", "rows", "fill_diagonal_", "masked_fill_")


def parts(kind: str, size: int = 20) -> list[list[str]]:
    """The names of a kind's changes, some at a time: they share one trace."""
    names = list(KINDS[kind][1])
    return [names[i : i + size] for i in range(0, len(names), size)]


class Changes(nn.Module):
    """Several changes, each of a value and by a value of its own."""

    def __init__(self, ways: dict[str, Change], dtype: torch.dtype) -> None:
        super().__init__()
        self.ways = list(ways.values())
        start = torch.randn(len(ways), 2, 6, 4)
        value = torch.complex(start, start.flip(-1)) if dtype.is_complex else start
        self.a = nn.ParameterList(nn.Parameter(pair[0]) for pair in value)
        self.b = nn.ParameterList(nn.Parameter(pair[1]) for pair in value)

    def forward(self, x: Tensor) -> list[Tensor]:
        results = []
        for way, a, b in zip(self.ways, self.a, self.b, strict=True):
            y, z = a * x, b * x
            kept = y.clone()
            way(kept, z)
            results.append(kept * 1.0 + z * 0.5)
        return results


def scalar(results: list[Tensor], weights: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for result, weight in zip(results, weights, strict=True):
        found = (result * weight).sum()
        total = total + (torch.view_as_real(found).sum() if found.is_complex() else found)
    return total


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("real", QUICK),
        pytest.param("complex", QUICK, marks=pytest.mark.slow),
        *(pytest.param(kind, names, marks=pytest.mark.slow) for kind in KINDS for names in parts(kind)),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_changes_in_place_are_eagers(kind: str, names: tuple[str, ...]) -> None:
    dtype, ways = KINDS[kind]
    torch.manual_seed(0)
    model = Changes({name: ways[name] for name in names}, dtype)
    plain = copy.deepcopy(model)
    want = plain(torch.tensor(1.5))
    weights = [torch.randn_like(value) for value in want]
    scalar(want, weights).backward()
    parted = gp.partition(model, 2, strategy="layer")
    got = parted(torch.tensor(1.5))
    scalar(got, weights).backward()
    found = parted.grad_dict()
    for i, name in enumerate(names):
        assert got[i].dtype == want[i].dtype, name
        torch.testing.assert_close(got[i], want[i], msg=lambda text, name=name: f"{name}: {text}", equal_nan=True)
        for of, parameters in (("a", plain.a), ("b", plain.b)):
            gradient, expected = found.get(f"{of}.{i}"), parameters[i].grad
            assert (gradient is None) == (expected is None), f"{name}: {of} has {gradient}, on one device {expected}"
            if expected is not None:
                torch.testing.assert_close(
                    gradient, expected, msg=lambda text, name=name, of=of: f"{name}, gradient of {of}: {text}"
                )


@pytest.mark.parametrize("compared", ["gt_", "eq_"])
def test_comparisons_in_place_run_as_they_are(compared: str) -> None:
    model, x = Changes({compared: lambda y, z: getattr(y, compared)(z)}, torch.float32), torch.tensor(1.5)
    with pytest.raises(UnsupportedOperatorError, match=f"{compared} writes truth values over a tensor"):
        trace(model, (x,))
    plain = copy.deepcopy(model)
    torch.testing.assert_close(gp.partition(model, 2, strategy="layer")(x), plain(x))
