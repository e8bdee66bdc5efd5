"""Models and arguments that a trace has no place for: right, or refused by name before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import UnsupportedOperatorError
from graphpart.trace import trace


class MakesItsWeight(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "w"):
            self.w = nn.Parameter(torch.ones(4, 4))
        return x @ self.w


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        window = torch.hann_window(4)
        found = torch.stft(self.a(x).repeat(1, 4), 4, 2, window=window, return_complex=True)
        return torch.istft(found, 4, 2, window=window)


def ragged(**options: Any) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], **options)


@pytest.mark.parametrize("x", [ragged(), ragged(layout=torch.jagged)], ids=["nested", "jagged"])
def test_what_cannot_be_cut_is_refused_by_name(x: Tensor) -> None:
    with pytest.raises(UnsupportedOperatorError, match="nested tensor"):
        gp.partition(nn.Linear(4, 4), 2, strategy="layer")(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU()), "'0.weight' gets its shape in the first forward"),
        (MakesItsWeight, "'w' is made by the forward"),
        (Spectrum, "istft .* looks at the values"),
    ],
    ids=["lazy", "made", "istft"],
)
def test_what_is_no_graph_is_run_all_the_same(make: Callable[[], nn.Module], message: str) -> None:
    x = torch.randn(6, 4)
    with pytest.raises(UnsupportedOperatorError, match=message):
        trace(make(), (x,))
    torch.manual_seed(0)
    plain = make()
    model = copy.deepcopy(plain)
    torch.manual_seed(1)
    expected = [plain(x) for _ in range(2)]
    torch.manual_seed(1)
    parted = gp.partition(model, 2, strategy="layer")
    found = [parted(x) for _ in range(2)]
    torch.testing.assert_close(found, expected)
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_a_model_without_parameters_runs() -> None:
    x = torch.randn(6, 4)
    assert torch.equal(
        gp.partition(nn.Sequential(nn.ReLU(), nn.Softmax(-1)), 2, strategy="batch")(x), x.relu().softmax(-1)
    )


def test_a_weight_that_was_made_before_is_a_parameter() -> None:
    model, x = MakesItsWeight(), torch.randn(6, 4)
    expected = model(x)
    torch.testing.assert_close(gp.partition(model, 2, strategy="batch")(x), expected)
