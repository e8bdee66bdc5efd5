"""Each step of a program is charged with what it does, so that they add up to the graph and what is done twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from graphpart.cost import make_cluster
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Tile
from graphpart.planning.choices import Choices
from graphpart.planning.make import make_plan
from graphpart.planning.plan import Plan
from graphpart.trace import trace
from tests.helpers.models import gpt2_example

BATCH = 8


class Perceptron(nn.Module):
    """Two layers under a cross-entropy with ignored labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(x), labels)


class Images(nn.Module):
    """Convolutions and BatchNorms under a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


@cache
def graph_of(model: str) -> Graph:
    if model == "perceptron":
        labels = torch.tensor([3, -100] * (BATCH // 2))
        return trace(Perceptron(), (torch.zeros(BATCH, 16), labels)).graph
    if model == "images":
        return trace(Images(), (torch.zeros(BATCH, 4, 8, 8),)).graph
    example = gpt2_example(BATCH)
    return trace(example.model, example.args, example.kwargs).graph


def work(op: Operator) -> float:
    return op.flops_forward + op.flops_backward


def program_work(plan: Plan) -> float:
    """FLOPs of all steps, forward and backward."""
    total = 0.0
    for segment in plan.program.segments:
        for step in segment.steps:
            if not step.is_bridge:
                op = plan.program.graph.operator[step.operator]
                total += step.share * (work(op) + segment.recompute * op.flops_forward)
    return total


def times_computed(plan: Plan) -> dict[str, float]:
    """Per operator of the program's graph, how often its steps compute it, together."""
    found: dict[str, float] = defaultdict(float)
    for segment in plan.program.segments:
        for step in segment.steps:
            if not step.is_bridge:
                found[step.operator] += step.share
    return found


def volume(op: Operator, tiles: Sequence[Tile]) -> float:
    """How often tiles cover an operator's iteration space."""
    extents = op.rule.extents if op.rule else {}
    return sum(prod(len(part) / extents[axis] for axis, part in tile.axes.items()) for tile in tiles)


def expected_times(plan: Plan, op: Operator) -> tuple[float, str]:
    """How often a traced operator has to be computed, and why more than once: said by its tiles, not by its steps."""
    own = [(s.device, step) for s in plan.program.segments for step in s.steps if step.operator == op.name]
    steps = [(device, step) for device, step in own if not step.is_bridge]
    tiles = plan.placement.tiles[op.name]
    if op.name in plan.graph.unsourced:
        return len({device for device, _ in steps}), "made where it is read"
    is_whole = len(tiles) == 1 and not tiles[0].axes
    if is_whole and all(step.share == 1 for _, step in steps):
        assert len(steps) == 1 or (op.rule and op.rule.linear), f"{op} is computed {len(steps)} times"
        return len(steps), "linear in a sum, taken term by term"
    return volume(op, tiles), "on several devices"


def rewritten(plan: Plan) -> set[str]:
    """Traced operators that others stand in for."""
    return {op.name for op in plan.graph.operators} - {o.name for o in plan.program.graph.operators if not o.stands_for}


def named(plan: Plan) -> dict[str, float]:
    """FLOPs of the program that the graph does not have, by name."""
    found: dict[str, float] = {}
    for op in plan.graph.operators:
        if op.name not in rewritten(plan):
            times, why = expected_times(plan, op)
            found[f"{op.name}: {why}"] = (times - 1) * work(op)
        else:
            found[f"{op.name}: computed in parts instead"] = -work(op)
    for op in plan.program.graph.operators:
        if op.stands_for:
            found[f"{op.name}: {op.target} for {op.origin}"] = work(op) * times_computed(plan)[op.name]
    for segment in plan.program.segments:
        for step in segment.steps if segment.recompute else ():
            op = plan.program.graph.operator[step.operator]
            found[f"{op.name}: run again"] = found.get(f"{op.name}: run again", 0.0) + step.share * op.flops_forward
    return found


CASES = [
    (model, strategy, num_microbatches)
    for model, strategies in {
        "perceptron": ("layer", "batch", "feature", "hybrid", "free"),
        "images": ("layer", "batch", "feature", "spatial", "hybrid", "free"),
        "gpt2": ("layer", "batch", "feature", "hybrid", "free"),
    }.items()
    for strategy in strategies
    for num_microbatches in (1, 4)
]


@pytest.mark.parametrize(("model", "strategy", "num_microbatches"), CASES)
def test_steps_add_up_to_the_graph_and_what_is_done_twice(model: str, strategy: str, num_microbatches: int) -> None:
    plan = make_plan(
        graph_of(model), make_cluster("2xA100"), Choices(strategy=strategy, num_microbatches=num_microbatches)
    )
    check(plan)


def check(plan: Plan) -> None:
    more = named(plan)
    assert program_work(plan) == pytest.approx(plan.graph.flops + sum(more.values()), rel=1e-9)
    lowered = plan.program.graph
    for op in plan.graph.operators:
        if op.name not in rewritten(plan):
            continue
        parts = {part.target: part for part in lowered.operators if part.stands_for == op.name}
        total = sum(work(part) * times_computed(plan)[part.name] for part in parts.values())
        times = volume(op, plan.placement.tiles[op.name])
        few = 4 * plan.graph.values[op.operands[-1]].num_elements  # labels, channels: small beside scores, images
        if "_batch_norm" in op.target or "graphpart.logsumexp_part" in parts:
            assert 0.5 * times * work(op) <= total <= 1.5 * times * work(op) + few
        else:
            assert times * work(op) <= total <= times * work(op) + few


def test_what_runs_again_is_counted_twice() -> None:
    plan = make_plan(graph_of("gpt2"), make_cluster("2xA100"), Choices(strategy="batch", recompute="transformer.h.*"))
    again = sum(flops for name, flops in named(plan).items() if name.endswith("run again"))
    assert again > 0
    check(plan)


def test_a_rewritten_operator_says_what_it_comes_from() -> None:
    plan = make_plan(graph_of("gpt2"), make_cluster("2xA100"), Choices(strategy="batch", num_microbatches=4))
    lowered = plan.program.graph
    made = {op.name: op.origin for op in lowered.operators if op.stands_for}
    assert made["cross_entropy_loss"] == made["cross_entropy_loss.sum"] == "cross_entropy_loss"
    assert set(made.values()) <= set(plan.graph.operator)
    assert all(op.origin == op.name for op in plan.graph.operators)


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_eight_devices_take_eight_batches_in_the_time_of_one(num_microbatches: int) -> None:
    """GPT-2 with its loss: the loss is cut with the batch, and charged once."""

    def makespan_s(devices: str, batch: int, strategy: str, num_microbatches: int) -> float:
        with torch.device("meta"):
            ids = torch.zeros(batch, 128, dtype=torch.long)
            graph = trace(
                GPT2LMHeadModel(GPT2Config(n_layer=2, use_cache=False)), (), {"input_ids": ids, "labels": ids}
            ).graph
        plan = make_plan(graph, make_cluster(devices), Choices(strategy=strategy, num_microbatches=num_microbatches))
        return plan.timeline.makespan_s

    one = makespan_s("1xA100", 16, "single", 1)
    eight = makespan_s("8xA100", 128, "batch", num_microbatches)
    assert one <= eight <= 1.3 * one
