"""Models and arguments that a trace has no place for: right, or refused by name before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import UnsupportedOperatorError


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


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (nn.Sequential(nn.LazyLinear(4)), torch.randn(6, 4), "'0.weight' gets its shape in the first forward"),
        (MakesItsWeight(), torch.randn(6, 4), "'w' is made by the forward"),
        (Spectrum(), torch.randn(6, 4), "istft .* looks at the values"),
        (nn.Linear(4, 4), ragged(), "nested tensor"),
        (nn.Linear(4, 4), ragged(layout=torch.jagged), "nested tensor"),
    ],
    ids=["lazy", "made", "istft", "nested", "jagged"],
)
def test_what_cannot_be_traced_is_refused_by_name(model: nn.Module, x: Tensor, message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        gp.partition(model, 2, strategy="layer")(x)
    assert all(type(p) is nn.Parameter or "Uninit" in type(p).__name__ for p in model.parameters())


def test_a_model_without_parameters_runs() -> None:
    x = torch.randn(6, 4)
    assert torch.equal(
        gp.partition(nn.Sequential(nn.ReLU(), nn.Softmax(-1)), 2, strategy="batch")(x), x.relu().softmax(-1)
    )


def test_a_weight_that_was_made_before_is_a_parameter() -> None:
    model, x = MakesItsWeight(), torch.randn(6, 4)
    expected = model(x)
    torch.testing.assert_close(gp.partition(model, 2, strategy="batch")(x), expected)
