"""Processes on Gloo give the same bits as threads, however parameters are cut and wherever gradients come together.

Looked at are outputs, losses, norms, gradients (of inputs, too), weights and buffers, and how what the caller is given
lies in memory: what the caller makes of it depends on that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphpart as gp
from tests.helpers.fused import ordered_by
from tests.helpers.models import make_example
from tests.helpers.processes import process_group, run_processes
from tests.oracle import (
    Case,
    Weighted,
    copied,
    fused_loss,
    make_optimizer,
    partitioned,
    random_cases,
    scheduled_by,
    trace_of,
    traced_as,
)
from tests.test_cut_homes import cut_by_columns

STEPS = 2
CLIP = 0.1
SEEDS = {2: (201,), 3: (305,)}
"""By number of devices: of the random models."""


class Odd(nn.Module):
    """Extents that fill no vector; weights with strides of their own; an input that is read in three places."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(30, 37)
        self.turned = nn.Parameter(torch.randn(29, 37).t() / 6)
        self.gate = nn.Parameter(torch.randn(3, 29))
        self.down = nn.Linear(29, 23, bias=False)
        self.beside = nn.Linear(30, 23)
        self.conv = nn.Conv2d(3, 5, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(self.up(x)) @ self.turned
        hidden = self.down(hidden * F.silu(self.gate).sum(0))
        seen = self.conv(image).contiguous().sigmoid()  # a copy only where the weight is laid as images are
        return (hidden + self.beside(x) + F.silu(x).mean(1, keepdim=True)).t(), seen.transpose(1, 3)


def ways_to_cut(world: int) -> list[tuple[str, Any, bool]]:
    """For the model above, strategies by name, and whether to train in fused steps.

    Operators are cut over results, over what is summed up and over samples, or the homes of parameters alone.
    """
    devices = list(range(world))
    uneven = {device: 1 + 2 * device for device in devices}
    if world == 2:
        sums = {"up": gp.split("k", devices), "down": gp.split("k", uneven), "beside": gp.pin(1), "*": 0}
        alone = cut_by_columns(world, "homes alone")
        return [
            ("feature", "feature", True),
            ("feature", "feature", False),
            ("sums", sums, False),
            ("homes alone", alone, True),
        ]
    results = {"up": gp.split("n", uneven), "conv": gp.split("o", devices), "beside": 1, "*": 0}
    scattered = cut_by_columns(world, "scattered")
    return [
        ("batch", "batch", True),
        ("batch", "batch", False),
        ("results", results, False),
        ("scattered", scattered, True),
    ]


def loss_of(result: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """A loss whose digits depend on strides."""
    scores, seen = result
    return F.cross_entropy(scores.t(), target) + F.silu(scores).mean() + F.silu(seen).sum() / 100


def train_odd(strategy: Any, world: int, is_fused: bool) -> dict[str, Tensor]:
    """Steps of the model above; returns all that they leave behind."""
    torch.manual_seed(0)
    # What is put together from microbatches is contiguous; alone, outputs lie as they were made.
    parted = gp.partition(Odd(), world, strategy=strategy, num_microbatches=2 if is_fused else 1)
    optimizer = torch.optim.AdamW(parted.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        x, image = (torch.randn(s, generator=draw, requires_grad=not is_fused) for s in ((7, 30), (7, 3, 5, 6)))
        target = torch.arange(7)
        if is_fused:
            options = {"optimizer": optimizer, "scaler": scaler, "keep_gradients": True, "return_outputs": True}
            done = parted.train_step(x, image, loss_fn=loss_of, target=target, clip_grad_norm=CLIP, **options)
            note(found, step, parted, done.outputs, {"loss": done.loss, "norm": done.grad_norm}, (x, image))
        else:
            result = parted(x, image)
            loss = loss_of(result, target)
            loss.backward()
            note(found, step, parted, result, {"loss": loss.detach(), "norm": norm_of_uncut(parted)}, (x, image))
            optimizer.step()
        optimizer.zero_grad()
    return {**found, **{f"state {name}": value.clone() for name, value in parted.state_dict().items()}}


def train_case(case: Case) -> dict[str, Tensor]:
    """Steps of a random model in random tiles; returns all that they leave behind."""
    example, seed = make_example(case.recipe), case.schedule_seed or 0
    gpipe_seed = None if case.fused else case.schedule_seed
    found: dict[str, Tensor] = {}
    with traced_as(trace_of(case)), ordered_by(case.fused or "gpipe", seed) as schedule, scheduled_by(gpipe_seed):
        parted = partitioned(case, example.model, schedule if case.fused else None)
        optimizer = make_optimizer(case.optimizer, parted)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=seed % 2 == 0)
        torch.manual_seed(case.loss_seed)
        for step in range(STEPS):
            args, kwargs = copied((example.args, example.kwargs))
            if case.fused:
                loss = fused_loss(case.recipe, case.loss_seed)
                options = {"optimizer": optimizer, "keep_gradients": True, "return_outputs": True, **loss.options}
                done = parted.train_step(*args, clip_grad_norm=CLIP, scaler=scaler, **options, **kwargs)
                result, values = done.outputs, {"loss": done.loss, "norm": done.grad_norm}
            else:
                result = parted(*args, **kwargs)
                total = Weighted(case.loss_seed)(result)
                total.backward()
                values = {"loss": total.detach(), "norm": norm_of_uncut(parted)}
            note(found, step, parted, result, values, (args, kwargs))
            if not case.fused:
                optimizer.step()
            optimizer.zero_grad()
        return {**found, **{f"state {name}": value.clone() for name, value in parted.state_dict().items()}}


def note(
    found: dict[str, Tensor],
    step: int,
    parted: gp.PartitionedModule,
    result: Any,
    values: Mapping[str, Tensor],
    arguments: Any,
) -> None:
    """Add what one step gives."""
    found |= {f"{step} {name}": value for name, value in values.items()}
    outputs = [x.detach() for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    inputs = [x.grad for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
    for kind, tensors in ("output", outputs), ("gradient of input", inputs):
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                found[f"{step} {kind} {i}"] = tensor.clone()
                found[f"{step} strides of {kind} {i}"] = torch.tensor(tensor.stride())
    found |= {f"{step} gradient {name}": g.clone() for name, g in parted.grad_dict().items() if g is not None}


def norm_of_uncut(parted: gp.PartitionedModule) -> Tensor:
    """What the caller's own code makes of gradients; those of cut parameters it has as one tensor in threads alone."""
    cut = parted.plan.placement.shards
    gradients = [p.grad for name, p in parted.named_parameters() if p.grad is not None and name not in cut]
    return nn.utils.get_total_norm(gradients)


def runs(world: int, seeds: Sequence[int]) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """What is run in processes and in threads, by name."""
    found: dict[str, Callable[[], dict[str, Tensor]]] = {}
    for name, strategy, is_fused in ways_to_cut(world):
        found[f"{name}, fused={is_fused}"] = lambda s=strategy, f=is_fused: train_odd(s, world, f)  # type: ignore[misc]
    for seed in seeds:
        for case in random_cases(seed):
            recipe = replace(case.recipe, dtype="float32")  # which hides least
            case = replace(case, recipe=recipe, num_devices=world, placement="tiles")
            if case.fused is None or fused_loss(recipe, case.loss_seed) is not None:
                found[f"seed {seed}: {case}"] = lambda case=case: train_case(case)  # type: ignore[misc]
    return found


def _process(rank: int, world: int, seeds: Sequence[int], folder: str) -> None:
    torch.set_num_threads(1)
    with process_group(rank, world, folder):
        torch.save([run() for run in runs(world, seeds).values()], f"{folder}/rank{rank}.pt")


def differences(world: int, seeds: Sequence[int]) -> list[str]:
    """Per run that gives other bits in some process than in threads, what differs."""
    folder = run_processes(_process, world, seeds, timeout_s=120 + 60 * len(seeds))
    in_processes = [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
    wrong = []
    for i, (name, run) in enumerate(runs(world, seeds).items()):
        expected = run()
        for rank in range(world):
            found = in_processes[rank][i]
            assert found.keys() == expected.keys()
            if different := [key for key, value in expected.items() if not _equal(found[key], value)]:
                wrong.append(f"rank {rank}, {name}: {different}")
    return wrong


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are the same, those of zeros, too; any nan is as good as any other."""
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a.nan_to_num(1234.5), b.nan_to_num(1234.5)) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_the_bits_of_threads(world: int) -> None:
    wrong = differences(world, SEEDS[world])
    assert not wrong, "\n".join(wrong)
