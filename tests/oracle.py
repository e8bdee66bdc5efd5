"""The oracle: random model x random placement x random schedule against the plain model.

One :class:`Case` is one example, run as a call with ``loss.backward()`` and ``optimizer.step()``, or as one fused
``train_step``. It is checked for outputs, loss, every gradient, buffers, one optimizer step, message and byte counters,
and the same bits on repetition, with random sleeps injected into the workers.

Run it by hand with ``python -m tests.oracle --examples 1000 --seed 0``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphpart as gp
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Shard, Tile, default_homes
from graphpart.ir.program import Backward, Program
from graphpart.ir.region import Intervals, Region
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of, terms_of
from graphpart.order import dry_run, gpipe
from graphpart.runtime.device.worker import DeviceRun
from graphpart.runtime.executors import launch as executor_module
from graphpart.strategies import STRATEGIES
from graphpart.trace import Traced, trace
from tests.helpers.fused import ANY_ORDER, FUSED, FusedLoss, is_split, ordered_by
from tests.helpers.meshes import SIZES, in_rounds, random_mesh
from tests.helpers.models import Example, Recipe, make_example, random_recipe, without_dropout
from tests.helpers.traces import traced_as

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Largest difference allowed, relative to the scale of what is compared."""

SMALLEST_SCALE = 0.1
"""Values are of order one; one that is far smaller is a difference that cancels (the mean of a normalised image), and
its rounding is that of its terms.
"""

SMALLEST_GRADIENT = 1e-3
"""Where even the largest gradient is smaller, all of them cancel (that of a sum of what was normalised)."""

STEP_PER_GRADIENT = 10.0
"""Learning rate over epsilon of the AdamW that is used here."""

PLACEMENTS = ("scattered", "modules", "layers", "zigzag", "layer", "single")


@dataclass(frozen=True)
class Case:
    """One example: everything it depends on.

    Attributes:
        recipe: the model and its data.
        num_devices: workers.
        num_microbatches: parts of the batch.
        placement: kind of placement, one of :data:`PLACEMENTS`.
        placement_seed: of the devices and homes.
        schedule_seed: of the order of tasks; None for gpipe.
        optimizer: ``adamw`` or ``sgd``.
        loss_seed: which outputs the loss reads, and their weights.
        recompute_seed: of the modules that run again for their backward; None for none.
        fused: schedule of a fused step, one of :data:`fused.FUSED`; None for a call and a backward.
    """

    recipe: Recipe
    num_devices: int
    num_microbatches: int
    placement: str
    placement_seed: int
    schedule_seed: int | None
    optimizer: str
    loss_seed: int
    recompute_seed: int | None = None
    fused: str | None = None


def random_cases(seed: int, num_placements: int = 3, *, meshes: bool = False) -> list[Case]:
    """Cases that share one random model; fused ones share a loss, too, since that is traced with the model.

    Args:
        seed: of the model and all that is drawn.
        num_placements: cases.
        meshes: whether all of them are cut along several axes at once, on up to eight devices.
    """
    rng, own, fused = random.Random(seed), random.Random(~seed), random.Random(seed ^ 0xF05ED)
    recipe = random_recipe(rng)
    is_fused, loss_seed = fused.random() < 0.4, fused.randrange(1 << 16)
    if is_fused:  # train_step gives no gradients of inputs
        recipe = replace(recipe, input_grad=False)
    found = [
        Case(
            recipe=recipe,
            num_devices=rng.choice([1, 2, 2, 3, 3, 4]),
            num_microbatches=rng.choice([1, 2, 3, 4, 5]),
            placement="tiles" if rng.random() < 0.6 else rng.choice(["scattered", *PLACEMENTS]),
            placement_seed=rng.randrange(1 << 16),
            schedule_seed=rng.randrange(1 << 16) if rng.random() < 0.8 else None,
            optimizer=rng.choice(["adamw", "sgd"]),
            loss_seed=loss_seed if is_fused else rng.randrange(1 << 16),
            recompute_seed=own.randrange(1 << 16) if own.random() < 0.4 else None,
            fused=fused.choice([*FUSED, *ANY_ORDER]) if is_fused else None,
        )
        for _ in range(num_placements)
    ]
    sizes = random.Random(seed ^ 0x3E5)
    return [replace(case, placement="mesh", num_devices=sizes.choice(SIZES)) for case in found] if meshes else found


POOL = 300
"""Models among which :func:`varied_seeds` chooses."""


@functools.cache
def varied_seeds(first_seed: int, num_models: int, num_placements: int) -> tuple[int, ...]:
    """Seeds of models with their cases in which as many pairs of choices as possible occur together: greedy cover."""
    pairs_of = {}
    for seed in range(first_seed, first_seed + POOL):
        cases = random_cases(seed, num_placements)
        pairs_of[seed] = {pair for case in cases for pair in itertools.combinations(_choices(case), 2)}
    seen: set[tuple[Any, Any]] = set()
    found: list[int] = []
    for _ in range(num_models):
        best = max(pairs_of.keys() - set(found), key=lambda seed: (len(pairs_of[seed] - seen), -seed))
        found.append(best)
        seen |= pairs_of[best]
    return tuple(found)


def _choices(case: Case) -> list[tuple[str, Any]]:
    """What was drawn for a case but for seeds and sizes, each once."""
    recipe = case.recipe
    names = ("family", "loss", "outputs", "tied", "dtype", "training", "input_grad", "with_mask")
    found = {("block", name) for name, _ in recipe.blocks} | {(name, getattr(recipe, name)) for name in names}
    found |= {(name, getattr(case, name)) for name in ("num_devices", "num_microbatches", "placement", "optimizer")}
    found |= {("fused", case.fused), ("recompute", case.recompute_seed is None), ("order", case.schedule_seed is None)}
    return sorted(found, key=repr)


# --- random placements --------------------------------------------------------------------------------------------


def random_placement(kind: str, seed: int) -> Callable[..., Placement] | str:
    """A strategy that places operators and homes by a seed; ``layer`` and ``single`` are the library's own."""
    if kind in STRATEGIES:
        return kind

    def strategy(graph: Graph, cluster: gp.Cluster, num_microbatches: int = 1, **_: Any) -> Placement:
        rng = random.Random(seed)
        num_devices = len(cluster)
        if kind == "mesh":
            return random_mesh(graph, cluster, rng, num_microbatches)
        if kind == "tiles":
            return tiled_placement(graph, num_devices, rng)
        device_of = _devices(kind, graph, num_devices, rng)
        homes = default_homes(graph, device_of)
        if rng.random() < 0.5:
            homes = {name: rng.randrange(num_devices) if rng.random() < 0.5 else home for name, home in homes.items()}
        return Placement(Placement.whole(graph, device_of).tiles, homes)

    strategy.__name__ = kind
    return strategy


def tiled_placement(graph: Graph, num_devices: int, rng: random.Random) -> Placement:
    """Every operator cut at random: uneven spans, index sets, halos, contracted axes, replicas, two axes at once."""
    tiles = {op.name: random_tiles(op, num_devices, rng) for op in graph.operators}
    homes, shards = {}, {}
    for source in graph.sources:
        if source.kind == "parameter" and any(n > 1 for n in source.value.shape) and rng.random() < 0.4:
            shards[source.value.name] = random_shards(source.value.shape, num_devices, rng)
        elif source.kind != "input":
            homes[source.value.name] = rng.randrange(num_devices)
    return Placement(tiles, homes, shards)


def random_shards(shape: tuple[int, ...], num_devices: int, rng: random.Random) -> tuple[Shard, ...]:
    """A parameter's home cut along one dimension into spans or index sets."""
    dim = rng.choice([i for i, n in enumerate(shape) if n > 1])
    whole = Region.full(shape).dims
    parts = random_parts(shape[dim], rng, spans=rng.random() < 0.7)
    return tuple(Shard(rng.randrange(num_devices), Region((*whole[:dim], part, *whole[dim + 1 :]))) for part in parts)


def random_tiles(op: Operator, num_devices: int, rng: random.Random) -> tuple[Tile, ...]:
    """A legal cut of one operator: whole, replicas, or a grid over one or two axes."""
    axes = list(op.rule.cuttable) if op.rule else []
    roll = rng.random()
    if not axes or roll < 0.2:
        # What has no rule may keep a state of its own that only one device has.
        return (Tile(rng.randrange(num_devices)),)
    if roll < 0.35:
        return tuple(Tile(device) for device in rng.sample(range(num_devices), rng.randint(1, num_devices)))
    cells: list[dict[str, Intervals]] = [{}]
    for axis in rng.sample(axes, min(len(axes), rng.choice([1, 1, 2]))):
        assert op.rule is not None
        parts = random_parts(op.rule.extents[axis], rng, spans=op.rule.needs_runs(axis) or rng.random() < 0.7)
        cells = [{**cell, axis: part} for cell in cells for part in parts]
    rng.shuffle(cells)
    return tuple(Tile(rng.randrange(num_devices), cell) for cell in cells)


def random_parts(extent: int, rng: random.Random, spans: bool) -> list[Intervals]:
    """An axis in two or three uneven parts: spans, or sets of indices."""
    count = min(extent, rng.choice([2, 2, 3]))
    if spans:
        cuts = [0, *sorted(rng.sample(range(1, extent), count - 1)), extent]
        return [Intervals.span(a, b) for a, b in itertools.pairwise(cuts)]
    owner = [*range(count), *(rng.randrange(count) for _ in range(extent - count))]
    rng.shuffle(owner)
    return [Intervals.indices(i for i, o in enumerate(owner) if o == part) for part in range(count)]


def _devices(kind: str, graph: Graph, num_devices: int, rng: random.Random) -> dict[str, int]:
    names = [op.name for op in graph.operators]
    if kind == "scattered":
        return {name: rng.randrange(num_devices) for name in names}
    if kind == "modules":
        paths = list(dict.fromkeys(op.module_path for op in graph.operators))
        device_of_path = {path: rng.randrange(num_devices) for path in paths}
        return {op.name: device_of_path[op.module_path] for op in graph.operators}
    if kind == "layers":
        cuts = sorted(rng.randint(0, len(names)) for _ in range(num_devices - 1))
        return {name: sum(cut <= i for cut in cuts) for i, name in enumerate(names)}
    device, found = 0, {}
    for name in names:  # zigzag: runs of operators on devices in any order
        if rng.random() < 0.3:
            device = rng.randrange(num_devices)
        found[name] = device
    return found


def random_modules(case: Case) -> list[str]:
    """Some of the modules of a case's net; none without a seed."""
    paths = sorted({op.module_path for op in trace_of(case).graph.operators if op.module_path})
    if case.recompute_seed is None or not paths:
        return []
    rng = random.Random(case.recompute_seed)
    return rng.sample(paths, rng.randint(1, len(paths)))


# --- random schedules ---------------------------------------------------------------------------------------------


def random_schedule(workload: Workload, rng: random.Random) -> Schedule:
    """Any order of tasks that respects every dependency, as each device sees it."""
    waits_for = workload.waits_for
    lines: dict[str, list[list[Task]]] = {kind: [[] for _ in range(workload.program.num_devices)] for kind in "FB"}
    for kind in "FB":
        left = [task for task in waits_for if task.kind == kind]
        done = set(waits_for) - set(left) if kind == "B" else set()
        while left:
            task = rng.choice([t for t in left if all(other in done for other in waits_for[t])])
            left.remove(task)
            done.add(task)
            lines[kind][workload.device_of[task]].append(task)
    return Schedule("random", tuple((*f, *b) for f, b in zip(lines["F"], lines["B"], strict=True)))


@contextlib.contextmanager
def scheduled_by(seed: int | None) -> Iterator[None]:
    """Programs prepared inside run by a random schedule, which has to pass the dry run; None for gpipe."""

    def choose(workload: Workload) -> Schedule:
        schedule = random_schedule(workload, random.Random(seed))
        dry_run(workload, schedule)
        return schedule

    with mock.patch.object(executor_module, "gpipe", gpipe if seed is None else choose):
        yield


@contextlib.contextmanager
def sleeping_workers(seed: int, longest_s: float = 0.002) -> Iterator[None]:
    """Workers that stop for a random time before some of their tasks."""
    rng = random.Random(seed)
    timed = DeviceRun._timed

    def slow(self: DeviceRun, *args: Any) -> None:
        if rng.random() < 0.3:
            time.sleep(rng.random() * longest_s)
        timed(self, *args)

    with mock.patch.object(DeviceRun, "_timed", slow):
        yield


# --- running ------------------------------------------------------------------------------------------------------


def trace_of(case: Case) -> Traced:
    """The trace of a case's net, with the loss behind it if that is fused."""
    return _trace(case.recipe, case.loss_seed if case.fused else None)


@functools.lru_cache(maxsize=2)
def _trace(recipe: Recipe, loss_seed: int | None) -> Traced:
    example = make_example(recipe)
    if loss_seed is None:
        return trace(example.model, example.args, example.kwargs)
    loss = fused_loss(recipe, loss_seed)
    assert loss is not None
    return trace(example.model, example.args, example.kwargs, loss=loss.traced)


@functools.lru_cache(maxsize=2)
def fused_loss(recipe: Recipe, seed: int) -> FusedLoss | None:
    """The loss of a fused step; None if the net gives nothing that has a gradient."""
    example = make_example(recipe)
    with torch.random.fork_rng():
        return FusedLoss.draw(example.model(*example.args, **example.kwargs), seed)


@dataclass
class Outcome:
    """All that one training step leaves behind."""

    result: Any
    loss: Tensor
    gradients: dict[str, Tensor | None]
    input_gradients: list[Tensor | None]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Weighted:
    """A loss over outputs: their sum by random weights, of all differentiable ones or only of some."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def chosen(self, result: Any) -> list[Tensor]:
        """The outputs that take part."""
        rng = random.Random(self.seed)
        outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.grad_fn is not None]
        if len(outputs) > 1 and rng.random() < 0.4:
            outputs = rng.sample(outputs, rng.randint(1, len(outputs) - 1))
        return outputs

    def __call__(self, result: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        terms = []
        for output in self.chosen(result):
            weight = torch.rand(output.shape, generator=generator, dtype=torch.float64) + 0.5
            terms.append((output * weight.to(output.dtype)).sum())
        return torch.stack(terms).sum()


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over all parameters.

    AdamW's epsilon is large: where a gradient is zero in exact arithmetic (a bias before BatchNorm), its rounding
    noise divided by its own size would otherwise be a step as large as any.
    """
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)


def copied(tree: Any) -> Any:
    """Arguments of one's own, so that a mutation or a gradient stays with one run."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), tree)


def train_step(
    model: nn.Module, example: Example, loss_fn: Callable[[Any], Tensor], optimizer: torch.optim.Optimizer
) -> tuple[Outcome, tuple[Any, Any]]:
    """One step; returns what it leaves behind, and its arguments."""
    args, kwargs = copied((example.args, example.kwargs))
    optimizer.zero_grad()
    result = model(*args, **kwargs)
    loss = loss_fn(result)
    loss.backward()
    gradients = {name: clone(p.grad) for name, p in model.named_parameters()}
    optimizer.step()
    return outcome_of(model, result, loss.detach(), gradients, (args, kwargs)), (args, kwargs)


def fused_step(
    model: gp.PartitionedModule, example: Example, loss: FusedLoss, optimizer: torch.optim.Optimizer
) -> tuple[Outcome, tuple[Any, Any]]:
    """One fused step; returns as :func:`train_step` does."""
    args, kwargs = copied((example.args, example.kwargs))
    optimizer.zero_grad()
    options = {"optimizer": optimizer, "keep_gradients": True, "return_outputs": True, **loss.options}
    step = model.train_step(*args, **options, **kwargs)
    gradients = {name: clone(p.grad) for name, p in model.named_parameters()}
    return outcome_of(model, step.outputs, step.loss, gradients, (args, kwargs)), (args, kwargs)


def outcome_of(
    model: nn.Module, result: Any, loss: Tensor, gradients: dict[str, Tensor | None], arguments: Any
) -> Outcome:
    """What a step has left behind in a model and its arguments."""
    leaves = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
    return Outcome(
        result,
        loss,
        gradients,
        [clone(x.grad) for x in leaves],
        {name: p.detach().clone() for name, p in model.named_parameters()},
        {name: b.detach().clone() for name, b in model.named_buffers()},
    )


def clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


# --- comparing ----------------------------------------------------------------------------------------------------


def compare(ours: Outcome, plain: Outcome) -> list[str]:
    """What differs between two steps, beyond rounding.

    In float64 every tensor is compared on its own scale. A gradient that is zero in exact arithmetic (of a scale or
    bias that a BatchNorm behind it cancels) is rounding noise in both models, and a comparison relative to its own
    size means nothing; so the scale is never taken below 1e-3 of the largest gradient. In float32 that noise is
    larger, and all gradients are compared on the scale of the largest.
    """
    found = compare_results(ours.result, plain.result)
    found += _difference("loss", ours.loss, plain.loss, SMALLEST_SCALE)
    gradients = [g for g in [*plain.gradients.values(), *plain.input_gradients] if g is not None]
    largest = max((float(g.abs().max()) for g in gradients if g.numel()), default=0.0)
    largest = max(largest, SMALLEST_GRADIENT)
    pairs = [(f"gradient of {name}", ours.gradients.get(name), g) for name, g in plain.gradients.items()]
    inputs = zip(ours.input_gradients, plain.input_gradients, strict=True)
    pairs += [(f"gradient of input {i}", a, b) for i, (a, b) in enumerate(inputs)]
    for name, a, b in pairs:
        narrow = b is not None and b.dtype != torch.float64
        found += _difference(name, a, b, largest if narrow else largest * 1e-3)
    for name, b in plain.parameters.items():
        # A step is at most STEP_PER_GRADIENT times the gradient, and so is what the gradients' rounding makes of it.
        scale = SMALLEST_SCALE if b.dtype == torch.float64 else max(SMALLEST_SCALE, STEP_PER_GRADIENT * largest)
        found += _difference(f"parameter {name} after the step", ours.parameters[name], b, scale)
    for name, b in plain.buffers.items():
        found += _difference(f"buffer {name}", ours.buffers[name], b, 1e-2)
    return found


def compare_results(ours: Any, plain: Any) -> list[str]:
    """What differs between two results: structure, kinds of leaves, values."""
    our_leaves, our_spec = pytree.tree_flatten(ours)
    leaves, spec = pytree.tree_flatten(plain)
    if our_spec != spec:
        return [f"the result is {our_spec} instead of {spec}"]
    found = []
    for i, (a, b) in enumerate(zip(our_leaves, leaves, strict=True)):
        if isinstance(b, Tensor):
            found += _difference(f"output {i}", a, b, SMALLEST_SCALE)
            if isinstance(a, Tensor) and a.requires_grad != b.requires_grad:
                found.append(f"output {i} requires_grad is {a.requires_grad} instead of {b.requires_grad}")
        elif a != b:
            found.append(f"output {i} is {a!r} instead of {b!r}")
    return found


def _difference(name: str, a: Any, b: Tensor | None, smallest_scale: float = 0.0) -> list[str]:
    if a is None or b is None:
        return (
            []
            if a is b
            else [f"{name} is {'None' if a is None else 'a tensor'}, plain {'None' if b is None else 'not'}"]
        )
    if a.shape != b.shape or a.dtype != b.dtype:
        return [f"{name} is {a.dtype} {tuple(a.shape)} instead of {b.dtype} {tuple(b.shape)}"]
    a, b = a.detach(), b.detach()
    if torch.equal(a, b) or (b.isnan().any() and torch.equal(a.isnan(), b.isnan())):
        return []
    if not b.is_floating_point():
        return [f"{name} is {a.tolist()} instead of {b.tolist()}"]
    a64, b64 = a.double(), b.double()
    scale = max(float(b64.abs().max()), smallest_scale)
    error = float((a64 - b64).abs().max())
    if error <= RELATIVE[b.dtype] * scale:
        return []
    return [
        f"{name} differs by {error:.3g} (scale {scale:.3g}, relative {error / scale if scale else float('inf'):.2g})"
    ]


def same_bits(ours: Outcome, other: Outcome) -> list[str]:
    """What differs in any bit."""
    found = []
    for part in ("result", "loss", "gradients", "input_gradients", "parameters", "buffers"):
        for i, (a, b) in enumerate(
            zip(pytree.tree_leaves(getattr(ours, part)), pytree.tree_leaves(getattr(other, part)), strict=True)
        ):
            if (isinstance(a, Tensor) and not torch.equal(a, b)) or (not isinstance(a, Tensor) and a != b):
                found.append(f"{part} {i} has other bits on repetition")
    return found


def compare_identity(ours: Any, our_arguments: Any, plain: Any, plain_arguments: Any) -> list[str]:
    """An output that is an input has to be the caller's own object; inputs must end up with the same values."""
    found = []
    our_inputs, inputs = pytree.tree_leaves(our_arguments), pytree.tree_leaves(plain_arguments)
    for i, (a, b) in enumerate(zip(pytree.tree_leaves(ours), pytree.tree_leaves(plain), strict=True)):
        for j, given in enumerate(inputs):
            if isinstance(b, Tensor) and b is given and a is not our_inputs[j]:
                found.append(f"output {i} is not the input {j} itself")
    for j, (a, b) in enumerate(zip(our_inputs, inputs, strict=True)):
        if isinstance(b, Tensor):
            found += _difference(f"input {j} after the step", a, b)
    return found


# --- counters -----------------------------------------------------------------------------------------------------


def expected_traffic(program: Program, backward: Backward) -> tuple[int, int]:
    """Messages and bytes of one step by the program's own statement."""
    return program.num_messages + backward.num_messages, program.message_bytes + backward.message_bytes


def check_counters(parted: gp.PartitionedModule, result: Any, chosen: Sequence[Tensor]) -> list[str]:
    """The runtime's counters against the program, and the program against what the graph allows."""
    program = parted.last_step.program
    leaves = pytree.tree_leaves(result, is_leaf=lambda x: x is None)
    live = {w for x, w in zip(leaves, program.outputs, strict=True) if any(x is c for c in chosen)}
    return _check_traffic(parted, backward_of(program, sorted(live)))


def check_fused_counters(parted: gp.PartitionedModule) -> list[str]:
    """As :func:`check_counters`, for a fused step: its loss, the first output, is what has a gradient."""
    program = parted.last_step.program
    return _check_traffic(parted, backward_of(program, dict.fromkeys(terms_of(program, program.outputs[0]))))


def _check_traffic(parted: gp.PartitionedModule, backward: Backward) -> list[str]:
    program, graph = parted.last_step.program, parted.last_step.plan.graph
    found = []
    num_messages, message_bytes = expected_traffic(program, backward)
    report = parted.last_step
    if (report.num_messages, report.message_bytes) != (num_messages, message_bytes):
        found.append(
            f"{report.num_messages} messages of {report.message_bytes} bytes were sent, the program states "
            f"{num_messages} of {message_bytes}"
        )
    if len({(b.wire, b.source, b.destination) for b in (*program.bridges, *backward.bridges)}) != num_messages:
        found.append("a wire crosses twice between the same two devices")
    forward = {(b.wire, b.source, b.destination) for b in program.bridges}
    if not {(b.wire, b.destination, b.source) for b in backward.bridges} <= forward:
        found.append("a gradient message mirrors no forward message")
    if not is_cut(parted.plan.placement):
        found += _check_fewest(graph, program, parted.plan.placement)
    return found


def is_cut(placement: Placement) -> bool:
    """Whether some operator has several tiles, or a parameter several homes."""
    return bool(placement.shards) or any(len(tiles) > 1 for tiles in placement.tiles.values())


def _check_fewest(graph: Graph, program: Program, placement: Placement) -> list[str]:
    """Between two devices, a source crosses at most once a step, any other value at most once a microbatch."""
    crossings: dict[tuple[str, int, int], int] = {}
    for bridge in program.bridges:
        key = (program.wire[bridge.wire].value, bridge.source, bridge.destination)
        crossings[key] = crossings.get(key, 0) + 1
    found = []
    for (value, source, destination), number in crossings.items():
        allowed = 1 if value in graph.source else program.num_microbatches
        if number > allowed:
            found.append(f"{value!r} crosses {number} times from device {source} to {destination}")
    if program.num_microbatches == 1:
        most = _most_crossings(graph, placement)
        if len(program.bridges) > most:
            found.append(f"{len(program.bridges)} messages where the graph's edges need {most}")
    return found


def _most_crossings(graph: Graph, placement: Placement) -> int:
    """One per (value, reading device) that the value is not made on: counted from the graph alone."""
    needed = set()
    for op in graph.operators:
        for name in op.operands:
            if name in graph.source and graph.source[name].kind == "input":
                continue
            made_on = placement.device(graph.producer[name].name) if name in graph.producer else placement.homes[name]
            if made_on != placement.device(op.name):
                needed.add((name, placement.device(op.name)))
    for source, value in graph.mutations:
        if value in graph.producer and source in placement.homes:
            needed.add((value, placement.homes[source]))
    return len(needed)


# --- one case -----------------------------------------------------------------------------------------------------


def partitioned(case: Case, model: nn.Module, schedule: str | None = None) -> gp.PartitionedModule:
    """The case's model, partitioned as the case says."""
    strategy = random_placement(case.placement, case.placement_seed)
    return gp.partition(
        model,
        case.num_devices,
        strategy=strategy,
        num_microbatches=case.num_microbatches,
        schedule=schedule,
        deadline_s=10.0,
        recompute=random_modules(case) or "none",
    )


def check_case(case: Case) -> list[str]:
    """Run one case; returns everything that is wrong."""
    if case.fused is not None:
        return check_fused(case)
    example = make_example(case.recipe)
    traced = trace_of(case)
    loss_fn = Weighted(case.loss_seed)
    plain_model = without_dropout(copy.deepcopy(example.model))
    plain, plain_arguments = train_step(plain_model, example, loss_fn, make_optimizer(case.optimizer, plain_model))
    if not plain.loss.isfinite():
        return []
    initial = copy.deepcopy(example.model)
    model = copy.deepcopy(initial)
    with traced_as(traced):
        parted = partitioned(case, model)
        optimizer = make_optimizer(case.optimizer, parted)
        with scheduled_by(case.schedule_seed), parted.without_dropout(), sleeping_workers(case.schedule_seed or 0):
            ours, arguments = train_step(parted, example, loss_fn, optimizer)
        found = compare(ours, plain)
        found += compare_identity(ours.result, arguments, plain.result, plain_arguments)
        found += check_counters(parted, ours.result, loss_fn.chosen(ours.result))
        found += check_repetition(case, example, initial, parted)
    return found


def check_repetition(case: Case, example: Example, initial: nn.Module, parted: gp.PartitionedModule) -> list[str]:
    """With dropout on: the same bits by another schedule and other timing, the same numbers on one device."""
    loss_fn = Weighted(case.loss_seed)
    _reset(parted, initial)
    seed = case.loss_seed
    torch.manual_seed(seed)
    with scheduled_by(case.schedule_seed), sleeping_workers(seed):
        first, _ = train_step(parted, example, loss_fn, make_optimizer(case.optimizer, parted))
    again = partitioned(case, copy.deepcopy(initial))
    torch.manual_seed(seed)
    with sleeping_workers(seed + 1):
        second, _ = train_step(again, example, loss_fn, make_optimizer(case.optimizer, again))
    found = same_bits(first, second)
    if _repeats_alone(case, parted):
        alone = partitioned(replace(case, num_devices=1, placement="single"), copy.deepcopy(initial))
        torch.manual_seed(seed)
        third, _ = train_step(alone, example, loss_fn, make_optimizer(case.optimizer, alone))
        found += [f"with dropout, on one device: {text}" for text in compare(first, third)]
    return found


def _repeats_alone(case: Case, parted: gp.PartitionedModule) -> bool:
    """Whether one device draws the same masks: a cut dropout's depend on its regions."""
    return any(op.random for op in trace_of(case).graph.operators) and not is_cut(parted.plan.placement)


def check_fused(case: Case) -> list[str]:
    """Run one case as a fused step; returns everything that is wrong."""
    assert case.fused is not None
    loss = fused_loss(case.recipe, case.loss_seed)
    if loss is None:
        return []
    example = make_example(case.recipe)
    plain_model = without_dropout(copy.deepcopy(example.model))
    plain, plain_arguments = train_step(plain_model, example, loss, make_optimizer(case.optimizer, plain_model))
    if not plain.loss.isfinite():
        return []
    plain.result = pytree.tree_map_only(Tensor, lambda x: x if x.grad_fn is None else x.detach(), plain.result)
    initial, seed = copy.deepcopy(example.model), case.schedule_seed or 0
    with traced_as(trace_of(case)):
        with ordered_by(case.fused, seed) as name, sleeping_workers(seed):
            parted = partitioned(case, copy.deepcopy(initial), name)
            with parted.without_dropout():
                ours, arguments = fused_step(parted, example, loss, make_optimizer(case.optimizer, parted))
            found = compare(ours, plain)
            found += compare_identity(ours.result, arguments, plain.result, plain_arguments)
            found += check_fused_counters(parted)
            _reset(parted, initial)
            torch.manual_seed(case.loss_seed)
            first, _ = fused_step(parted, example, loss, make_optimizer(case.optimizer, parted))
        # The same bits in any other order of the same tasks, and with other timing.
        split = parted.plan.training.workload.split
        other = next(random_name for random_name in ANY_ORDER if is_split(random_name) == split)
        with ordered_by(other, seed + 1) as name, sleeping_workers(seed + 1):
            again = partitioned(case, copy.deepcopy(initial), name)
            torch.manual_seed(case.loss_seed)
            second, _ = fused_step(again, example, loss, make_optimizer(case.optimizer, again))
        found += same_bits(first, second)
        if _repeats_alone(case, parted):
            alone = partitioned(replace(case, num_devices=1, placement="single"), copy.deepcopy(initial))
            torch.manual_seed(case.loss_seed)
            third, _ = fused_step(alone, example, loss, make_optimizer(case.optimizer, alone))
            found += [f"with dropout, on one device: {text}" for text in compare(first, third)]
    return found


def _reset(parted: gp.PartitionedModule, initial: nn.Module) -> None:
    parted.load_state_dict(initial.state_dict())
    with torch.no_grad():  # state_dict leaves out buffers that aren't persistent
        for (_, ours), (_, given) in zip(parted.named_buffers(), initial.named_buffers(), strict=True):
            ours.copy_(given)


def check_safely(case: Case) -> list[str]:
    """As :func:`check_case`; an exception is one more thing that is wrong.

    Sums of a deep model in float32, taken in another order, may differ by a little more than :data:`RELATIVE` allows.
    They are right if the same case is right in float64, and in float32 within three times as much.
    """
    try:
        with in_rounds(case.placement_seed):
            found = check_case(case)
            if found and case.recipe.dtype == "float32":
                with mock.patch.dict(RELATIVE, {torch.float32: 3 * RELATIVE[torch.float32]}):
                    found = check_case(case)
                found += check_case(replace(case, recipe=replace(case.recipe, dtype="float64")))
            return found
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return [f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"]


def shrink(case: Case, num_tries: int = 40) -> Case:
    """A smaller case that is still wrong: fewer blocks, microbatches and devices."""
    for _ in range(num_tries):
        for smaller in _smaller(case):
            if check_safely(smaller):
                case = smaller
                break
        else:
            return case
    return case


def _smaller(case: Case) -> Iterator[Case]:
    blocks = case.recipe.blocks
    for i in range(len(blocks)):
        yield replace(case, recipe=replace(case.recipe, blocks=blocks[:i] + blocks[i + 1 :]))
    changes: Sequence[tuple[str, Mapping[Any, Any]]] = (
        ("num_devices", {8: 4, 6: 3, 4: 3, 3: 2, 2: 1}),
        ("num_microbatches", {5: 4, 4: 3, 3: 2, 2: 1}),
    )
    for name, lower in changes:
        if getattr(case, name) in lower:
            yield replace(case, **{name: lower[getattr(case, name)]})
    if case.schedule_seed is not None:
        yield replace(case, schedule_seed=None)
    if case.recompute_seed is not None:
        yield replace(case, recompute_seed=None)
    if case.fused not in (None, "gpipe"):
        yield replace(case, fused="gpipe")
    for name, value in (("loss", "none"), ("outputs", "tensor"), ("with_mask", False), ("input_grad", False)):
        if getattr(case.recipe, name) != value:
            yield replace(case, recipe=replace(case.recipe, **{name: value}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run many random examples; returns the number that are wrong."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="of the first model")
    parser.add_argument("--placements", type=int, default=3, help="cases per model")
    parser.add_argument("--meshes", action="store_true", help="only meshes, on up to eight devices")
    parser.add_argument("--shrink", action="store_true", help="cut every failure down")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_wrong = num_done = 0
    with tqdm(total=options.examples, mininterval=1.0) as bar:
        for seed in range(options.seed, sys.maxsize):
            for case in random_cases(seed, options.placements, meshes=options.meshes)[: options.examples - num_done]:
                if found := check_safely(case):
                    num_wrong += 1
                    case = shrink(case) if options.shrink else case
                    found = check_safely(case) or found
                    bar.write(f"seed {seed}: {case}\n  " + "\n  ".join(found[:6]))
                num_done += 1
                bar.update()
                bar.set_postfix(wrong=num_wrong)
            if num_done >= options.examples:
                break
    print(f"{num_done} cases from seed {options.seed}, {num_wrong} wrong")
    return num_wrong


if __name__ == "__main__":
    sys.exit(min(1, main()))
