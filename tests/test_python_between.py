"""What a call leaves to Python, since no graph can hold it: random numbers of others than torch, sizes in data."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphpart as gp

WIDTH = 4


class Between(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def by_a_number(x: Tensor) -> Tensor:
    return x * np.random.rand(1).item()


def by_an_array(x: Tensor) -> Tensor:
    return x * torch.from_numpy(np.random.rand(WIDTH).astype(np.float32))


def by_random(x: Tensor) -> Tensor:
    return x * random.random()


def results(model: nn.Module) -> list[Tensor]:
    np.random.seed(0)
    random.seed(0)
    return [model(torch.ones(3, WIDTH)).detach().clone() for _ in range(3)]


@pytest.mark.parametrize("between", [by_a_number, by_an_array, by_random])
def test_each_call_draws_for_itself_from_the_stream_that_its_model_names(between: Callable[[Tensor], Tensor]) -> None:
    model = Between(between)
    parted = gp.partition(copy.deepcopy(model), 2, strategy="layer")
    for wanted, found in zip(results(model), results(parted), strict=True):
        torch.testing.assert_close(found, wanted)


class Rows(Between):
    """Splits by a list whose length is data: TorchDynamo raises what is none of its own exceptions."""

    def __init__(self) -> None:
        super().__init__(torch.relu)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        parts = torch.split(self.a(x), lengths[lengths > 0].tolist())
        return self.b(torch.stack([part.sum(0) for part in parts]))


def test_parts_as_many_as_data_say() -> None:
    model, x = Rows(), torch.ones(5, WIDTH)
    parted = gp.partition(copy.deepcopy(model), 2, strategy="layer")
    for lengths in (torch.tensor([2, 3]), torch.tensor([5, 0])):
        torch.testing.assert_close(parted(x, lengths), model(x, lengths))


class Short(Between):
    """Fails by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).transpose(0, 2))


def test_what_fails_by_itself_is_told_as_that() -> None:
    with pytest.raises((gp.GraphpartError, IndexError), match="Dimension out of range"):
        gp.partition(Short(torch.relu), 2, strategy="layer")(torch.ones(3, WIDTH))
