"""Sums of half-precision values in parts: made, sent and added in float32, as one kernel adds up the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
labels = torch.arange(600) % 8

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.mean(),
    "mean_rows": lambda y: y.mean(0),
    "mean_kept": lambda y: y.mean((0, 1), keepdim=True),
    "mean_wide": lambda y: y.mean(0, dtype=torch.float32),
    "sum_of_small": lambda y: (y * 0.01).sum(0),
    "sum_that_cancels": lambda y: torch.cat([y, -y]).sum(),
    "sum_scaled": lambda y: (y * 0.01).sum(0) * 0.5 + 1,
    "mse_mean": lambda y: F.mse_loss(y, y - 200),
    "mse_sum": lambda y: F.mse_loss(y * 0.01, torch.zeros_like(y), reduction="sum"),
    "l1_mean": lambda y: F.l1_loss(y, -y),
    "bce_mean": lambda y: F.binary_cross_entropy_with_logits(y, torch.zeros_like(y)),
    "cross_entropy": lambda y: F.cross_entropy(y * 0.1, labels[: len(y)]),
    "cross_entropy_ignoring": lambda y: F.cross_entropy(y * 0.1, labels[: len(y)], ignore_index=3),
    "cross_entropy_sum": lambda y: F.cross_entropy(y * 0.1, labels[: len(y)], reduction="sum"),
    "cross_entropy_none": lambda y: F.cross_entropy(y * 0.1, labels[: len(y)], reduction="none"),
    "nll_mean": lambda y: F.nll_loss(F.log_softmax(y * 0.1, 1), labels[: len(y)]),
    "var": lambda y: y.var(0),
    "norm": lambda y: torch.linalg.vector_norm(y, dim=0),
    "logsumexp": lambda y: y.logsumexp(0),
    "softmax": lambda y: y.softmax(0).square().sum(1),
    "layer_norm": lambda y: F.layer_norm(y, (8,)).sum(1),
}


class Reduced(nn.Module):
    """Large values, reduced."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.scale = nn.Parameter(torch.diag(torch.linspace(0.5, 1.5, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return REDUCTIONS[self.way](F.linear(x, self.scale))


def run(model: Callable[..., Tensor], parameter: Callable[[], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    out = model(x)
    out.float().mean().backward()
    gradient = parameter()
    assert gradient is not None
    return out.detach(), gradient


OPTIONS = (
    {"strategy": "batch"},
    {"strategy": "layer", "num_microbatches": 3},
    {"strategy": "batch", "num_microbatches": 2},
    {"strategy": "feature"},
)
CASES = [(way, (FLOAT16, BFLOAT16)[(i + j) % 2], j) for i, way in enumerate(REDUCTIONS) for j in ((i // 2) % 4, 2)]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("way", "dtype", "options"), dict.fromkeys(CASES), ids=str)
def test_parts_of_a_reduction_are_as_exact_as_the_whole(way: str, dtype: torch.dtype, options: int) -> None:
    torch.manual_seed(0)
    x = (torch.rand(600, 8) * 20 + 290).to(dtype)
    model = Reduced(way).to(dtype)
    plain = copy.deepcopy(model)
    eager, gradient = run(plain, lambda: plain.scale.grad, x)
    parted = gp.partition(model, 2, **OPTIONS[options])
    got, found = run(parted, lambda: parted.grad_dict()["scale"], x)
    unit = torch.finfo(dtype).eps
    assert bool(torch.isfinite(eager).all()) and got.dtype == eager.dtype
    torch.testing.assert_close(got, eager, rtol=2 * unit, atol=2 * unit)
    torch.testing.assert_close(found, gradient, rtol=8 * unit, atol=16 * unit * float(gradient.abs().max()))


def test_partial_sums_cross_in_float32() -> None:
    parted = gp.partition(Reduced("mean_rows").half(), 2, strategy="batch")
    x = torch.full((600, 8), 300.0, dtype=FLOAT16)
    torch.testing.assert_close(parted(x)[0], torch.tensor(150.0, dtype=FLOAT16))
    wires = {wire.name: wire.dtype for wire in parted.plan.program.wires}
    sent = {bridge.wire: bridge.size_bytes for bridge in parted.plan.program.bridges if "sum" in bridge.wire}
    assert sent and all(wires[name] == "float32" and size == 8 * 4 for name, size in sent.items())


def test_a_given_sum_is_widened_part_by_part() -> None:
    """Where the sum itself is the operator: each half overflows, the whole does not."""
    parted = gp.partition(Reduced("sum_that_cancels").half(), 2, strategy="batch", num_microbatches=2)
    assert float(parted(torch.full((600, 8), 300.0, dtype=FLOAT16)).detach()) == 0.0
