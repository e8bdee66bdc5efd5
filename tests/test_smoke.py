"""The shortest proof that all works together: three small models, each way to train, whole and in microbatches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp
from tests.helpers.processes import process_group, run_processes
from tests.helpers.zoo import MODELS, Sample


def mlp() -> Sample:
    torch.manual_seed(0)
    return Sample(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), (torch.randn(7, 6),), {})


def images() -> Sample:
    """A BatchNorm is a barrier: it waits for all microbatches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 4))
    return Sample(model, (torch.randn(7, 3, 6, 6),), {})


def gpt2() -> Sample:
    pytest.importorskip("transformers")
    sample = MODELS["gpt2"]()
    return Sample(sample.model.eval(), sample.args, sample.kwargs)  # without dropout, whose masks are drawn elsewhere


SAMPLES: dict[str, Callable[[], Sample]] = {"mlp": mlp, "images": images, "gpt2": gpt2}


def loss_of(result: Tensor | dict[str, Tensor]) -> Tensor:
    return result.square().mean() if isinstance(result, Tensor) else result["loss"]


def weights_after(model: nn.Module, sample: Sample, way: str) -> dict[str, Tensor]:
    """Parameters and buffers after two steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        if way == "train_step":
            model.train_step(*sample.args, **sample.kwargs, loss_fn=loss_of, optimizer=optimizer)
        else:
            optimizer.zero_grad()
            loss_of(model(*sample.args, **sample.kwargs)).backward()
            optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("way", ["call", "train_step"])
@pytest.mark.parametrize("name", SAMPLES)
def test_two_devices_train_as_one(name: str, way: str, num_microbatches: int) -> None:
    sample = SAMPLES[name]()
    parted = gp.partition(copy.deepcopy(sample.model), 2, strategy="layer", num_microbatches=num_microbatches)
    found = weights_after(parted, sample, way)
    expected = weights_after(sample.model, sample, "call")
    assert len({segment.device for segment in parted.plan.program.segments}) == 2
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def _train(rank: int, world: int, folder: str) -> None:
    with process_group(rank, world, folder):
        torch.set_num_threads(1)
        sample = mlp()
        parted = gp.partition(sample.model, world, strategy="layer", num_microbatches=4)
        torch.save({way: weights_after(parted, sample, way) for way in ("call", "train_step")}, f"{folder}/{rank}.pt")


@pytest.mark.processes
def test_two_processes_train_as_two_threads() -> None:
    folder = run_processes(_train, 2)
    sample = mlp()
    parted = gp.partition(sample.model, 2, strategy="layer", num_microbatches=4)
    for way in ("call", "train_step"):
        for name, value in weights_after(parted, sample, way).items():
            for rank in range(2):
                assert torch.equal(torch.load(folder / f"{rank}.pt")[way][name], value), (way, name)
