"""SINGA's rules for connections between partitioned layers (v0.3, ``neuralnet.cc`` and ``connection_layer``), run.

Layers are partitioned over N workers along dimension 0 (samples) or 1 (features). What crosses between two of them
depends on both dimensions, and on whether the destination reads element by element or all features for each of its own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.program import Step
from graphpart.ir.region import Intervals
from tests.helpers.placements import along, copies, equal, place, result_axis, sent, spans

pytestmark = pytest.mark.sampled(8)

BATCH, FEATURES = 12, 24
NUMBER_BYTES = 8  # float64

DIRECT, PARTS, WHOLE = "direct", "slice and concat", "whole value to every worker"

Case = tuple[int, int, str]
"""Dimension of the source, dimension of the destination, and what the destination reads."""

TABLE: dict[Case, str] = {
    (0, 0, "one-to-one"): DIRECT,
    (0, 0, "one-to-all"): DIRECT,
    (1, 1, "one-to-one"): DIRECT,
    (1, 1, "one-to-all"): WHOLE,
    (1, 0, "one-to-one"): PARTS,
    (1, 0, "one-to-all"): PARTS,
    (0, 1, "one-to-one"): PARTS,
    (0, 1, "one-to-all"): WHOLE,
}

CROSSING = [case for case, kind in TABLE.items() if kind != DIRECT]


class Edge(nn.Module):
    """Two layers and the edge between them; each worker returns what it holds of the second.

    Its weights are inputs, which are at hand everywhere: what crosses is the edge's alone.

    Args:
        layers: ``dense`` (inner product, ReLU) or ``image`` (convolution, max pooling).
        reads: ``one-to-one`` or ``one-to-all``.
        dim: the dimension that the result is cut along.
        pieces: sizes of its parts.
    """

    def __init__(self, layers: str, reads: str, dim: int, pieces: Sequence[int]) -> None:
        super().__init__()
        self.layers, self.reads, self.dim = layers, reads, dim
        self.pieces = [part.runs[0] for part in spans(pieces)]

    def forward(self, x: Tensor, source: Tensor, destination: Tensor) -> tuple[Tensor, ...]:
        if self.layers == "dense":
            y = F.linear(x, source)
            z = torch.relu(y) if self.reads == "one-to-one" else F.linear(y, destination)
        else:
            y = F.conv2d(x, source, padding=1)
            z = F.max_pool2d(y, 2) if self.reads == "one-to-one" else F.conv2d(y, destination, padding=1)
        return tuple(z[start:stop] if self.dim == 0 else z[:, start:stop] for start, stop in self.pieces)

    def inputs(self) -> list[Tensor]:
        """Samples of 6 features or of 2 channels, and the two layers' weights."""
        if self.layers == "dense":
            shapes = [(BATCH, 6), (FEATURES, 6), (FEATURES, FEATURES)]
        else:
            shapes = [(BATCH, 2, 4, 4), (FEATURES, 2, 3, 3), (FEATURES, FEATURES, 3, 3)]
        return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    @property
    def edge_bytes(self) -> int:
        """Bytes of the value between the layers."""
        return BATCH * FEATURES * NUMBER_BYTES * (1 if self.layers == "dense" else 4 * 4)


class Partitioned:
    """A strategy: the first layer cut over all workers along one dimension, the second along another."""

    def __init__(self, dims: Sequence[int], sizes: Sequence[Sequence[int]]) -> None:
        self.dims, self.sizes = dims, sizes

    def __call__(self, graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        tiles: dict[str, tuple[Tile, ...]] = {}
        for i, op in enumerate(graph.operators):
            if len(cluster) == 1:
                tiles[op.name] = copies([0])
            elif i < 2:
                tiles[op.name] = along(result_axis(op, self.dims[i]), spans(self.sizes[i]), range(len(cluster)))
            else:  # each worker returns its own part
                own = Intervals.full(op.results[0].shape[self.dims[1]])
                tiles[op.name] = (Tile(i - 2, {result_axis(op, self.dims[1]): own}),)
        return place(graph, tiles)


class Run:
    """One recorded step of an edge; results and gradients have been compared with those of one device.

    Attributes:
        model: the two layers.
        parted: the same, partitioned.
        forward: messages and bytes forward.
        both: messages and bytes forward and backward.
        forward_of: messages forward by worker.
    """

    def __init__(
        self, case: Case, num_workers: int, layers: str = "dense", sizes: Sequence[Sequence[int]] | None = None
    ) -> None:
        source_dim, destination_dim, reads = case
        dims = (source_dim, destination_dim)
        sizes = sizes or [equal((BATCH, FEATURES)[dim], num_workers) for dim in dims]
        torch.manual_seed(0)
        self.model = Edge(layers, reads, destination_dim, sizes[1])
        inputs = self.model.inputs()
        plain = [t.detach().clone().requires_grad_() for t in inputs]
        self.parted = gp.partition(self.model, num_workers, strategy=Partitioned(dims, sizes))
        self.parted.record = True
        out = self.parted(*inputs)
        assert self.parted.last_step is not None
        self.forward = sent(self.parted)
        self.forward_of = {d: c.num_messages for d, c in self.parted.last_step.counters.items()}
        squares(out).backward()
        self.both = sent(self.parted)
        expected = self.model(*plain)
        squares(expected).backward()
        for one, other in zip(out, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        for one, other in zip(inputs, plain, strict=True):
            if other.grad is None:  # of a second layer that has no weight
                assert one.grad is None
            else:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)

    def bridge_steps(self) -> dict[int, list[Step]]:
        """Per worker, the parts of bridges that it computed forward, as its record says."""
        found: dict[int, list[Step]] = {}
        for event in self.parted.timeline().events:
            if event.kind == "F":
                steps = self.parted.plan.program.segment[event.name].steps
                found.setdefault(event.device, []).extend(step for step in steps if step.is_bridge)
        return found

    def pairs(self) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
        """Messages by (sender, receiver), forward and backward, from the tags that the workers counted."""
        report = self.parted.last_step
        assert report is not None and report.backward is not None
        forward = {b.tag: b for b in report.program.bridges}
        backward = {b.tag: b for b in report.backward.bridges}
        tags = [(worker, tag) for worker, counters in report.counters.items() for tag in counters.tags]
        found = tuple(
            Counter((worker, known[tag].destination) for worker, tag in tags if tag in known)
            for known in (forward, backward)
        )
        assert sum(found[0].values()) + sum(found[1].values()) == len(tags)
        return found[0], found[1]


def squares(out: Sequence[Tensor]) -> Tensor:
    """The sum of all squares."""
    return torch.stack([piece.square().sum() for piece in out]).sum()


@pytest.mark.parametrize("layers", ["dense", "image"])
@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("case", TABLE)
def test_S1_split_table(case: Case, num_workers: int, layers: str) -> None:
    """All 8 cases: what is computed at either end of the edge, and the bytes between."""
    run = Run(case, num_workers, layers)
    kind = TABLE[case]
    every = {worker: [step.target for step in steps] for worker, steps in run.bridge_steps().items()}
    if kind == DIRECT:
        assert run.both == (0, 0) and not any(every.values())
        return
    pairs = num_workers * (num_workers - 1)
    share = num_workers if kind == WHOLE else num_workers**2  # of the value, in one message
    assert run.forward == (pairs, pairs * run.model.edge_bytes // share)
    assert run.both == (2 * pairs, 2 * run.forward[1])
    slices = [] if kind == WHOLE else ["graphpart.slice"] * num_workers
    assert every == {worker: [*slices, "graphpart.concat"] for worker in range(num_workers)}


@pytest.mark.parametrize("case", [case for case, kind in TABLE.items() if kind == PARTS])
def test_S1_slice_cuts_along_the_destinations_dimension_and_concat_joins_along_the_sources(case: Case) -> None:
    run = Run(case, 3)
    source_dim, destination_dim, _ = case
    lengths = [equal(BATCH, 3)[0], equal(FEATURES, 3)[0]]
    for steps in run.bridge_steps().values():
        *slices, concat = steps
        _, dim, _ = concat.args
        assert dim == source_dim and len(concat.args[0]) == 3
        for step in slices:
            _, runs = step.args
            assert [stop - start for ((start, stop),) in runs] == lengths
        starts = [[runs[0][0] for runs in step.args[1]] for step in slices]
        assert {tuple(start)[1 - destination_dim] for start in starts} == {0}  # whole along the source's
        assert len({tuple(start)[destination_dim] for start in starts}) == 3


@pytest.mark.parametrize("case", CROSSING)
@pytest.mark.parametrize("num_workers", [2, 4])
def test_S2_an_edge_has_a_bridge_for_every_ordered_pair_of_workers(case: Case, num_workers: int) -> None:
    run = Run(case, num_workers)
    forward, _ = run.pairs()
    assert len(forward) == num_workers * (num_workers - 1)
    assert run.forward_of == dict.fromkeys(range(num_workers), num_workers - 1)


@pytest.mark.parametrize("case", TABLE)
def test_S2_one_worker_has_no_bridge(case: Case) -> None:
    run = Run(case, 1)
    assert run.both == (0, 0) and not any(run.bridge_steps().values())
    assert [event.kind for event in run.parted.timeline().events] == ["F", "B"]


@pytest.mark.parametrize("case", CROSSING)
def test_S3_a_pair_carries_one_activation_forward_and_one_gradient_backward(case: Case) -> None:
    forward, backward = Run(case, 3).pairs()
    expected = {(a, b): 1 for a in range(3) for b in range(3) if a != b}
    assert dict(forward) == dict(backward) == expected


@pytest.mark.parametrize("case", CROSSING)
def test_S4_gradients_come_back_through_the_adjoint_of_every_bridge(case: Case) -> None:
    """Whole values add up the gradients of their copies, slices join them: :class:`Run` compares the sums."""
    run = Run(case, 3)
    report = run.parted.last_step
    assert report is not None
    kinds = [collective.kind for collective in report.collectives]
    assert kinds == (["all-gather", "reduce-scatter"] if TABLE[case] == WHOLE else ["all-to-all", "all-to-all"])


def dense_step(dim: int, num_workers: int) -> tuple[gp.PartitionedModule, int]:
    """A step of one layer with a weight and a bias, cut along a dimension; and the messages forward."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, FEATURES, dtype=torch.float64)
            self.pieces = [part.runs[0] for part in spans(equal((BATCH, FEATURES)[dim], num_workers))]

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.layer(x)
            return tuple(y[start:stop] if dim == 0 else y[:, start:stop] for start, stop in self.pieces)

    def strategy(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        first, *slices = graph.operators
        sets = spans(equal((BATCH, FEATURES)[dim], num_workers))
        tiles = {first.name: along(result_axis(first, dim), sets, range(num_workers))}
        for i, op in enumerate(slices):
            tiles[op.name] = (Tile(i, {result_axis(op, dim): Intervals.full(op.results[0].shape[dim])}),)
        return place(graph, tiles)

    torch.manual_seed(0)
    model, x = Layer(), torch.randn(BATCH, 6, dtype=torch.float64)
    squares(model(x)).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    parted = gp.partition(model, num_workers, strategy=strategy)
    out = parted(x)
    forward, _ = sent(parted)
    squares(out).backward()
    for name, found in parted.grad_dict().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=1e-12)
    return parted, forward


@pytest.mark.parametrize("num_workers", [2, 3])
def test_S6_dimension_0_shares_values_and_aggregates_gradients(num_workers: int) -> None:
    """The weight and the bias go to every other worker, and each sends its gradients of them back, once."""
    parted, forward = dense_step(0, num_workers)
    messages, size_bytes = sent(parted)
    assert forward == 2 * (num_workers - 1)
    assert messages == 2 * forward
    assert size_bytes == 2 * (num_workers - 1) * (6 + 1) * FEATURES * NUMBER_BYTES
    assert {parted.plan.placement.homes[name] for name in ("layer.weight", "layer.bias")} == {0}


@pytest.mark.parametrize("num_workers", [2, 3])
def test_S6_dimension_1_splits_weight_and_bias_by_output_unit(num_workers: int) -> None:
    """Each worker keeps and updates its own rows, so that nothing crosses."""
    parted, _ = dense_step(1, num_workers)
    assert sent(parted) == (0, 0)
    rows = spans(equal(FEATURES, num_workers))
    for name in ("layer.weight", "layer.bias"):
        assert [shard.region.dims[0] for shard in parted.plan.placement.shards[name]] == rows
    wires = {(w.value, w.region.dims[0]) for w in parted.plan.program.wires if w.origin == "parameter"}
    assert wires == {(name, row) for name in ("layer.weight", "layer.bias") for row in rows}


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize(
    "sizes",
    [([5, 5, 2], [7, 7, 10]), ([2, 8, 2], [20, 2, 2]), ([3, 3, 2, 2, 2], [5, 5, 5, 5, 4])],
)
def test_S7_parts_need_not_be_of_one_size(case: Case, sizes: tuple[list[int], list[int]]) -> None:
    """SINGA demands that N divides the dimension."""
    of_dim = dict(enumerate(sizes))
    num_workers = len(sizes[0])
    run = Run(case, num_workers, sizes=[of_dim[case[0]], of_dim[case[1]]])
    direct = TABLE[case] == DIRECT
    assert run.forward[0] == (0 if direct else num_workers * (num_workers - 1))
    if TABLE[case] == WHOLE:
        assert run.forward[1] == (num_workers - 1) * run.model.edge_bytes


STACK = {"0": (1, [0, 1, 2]), "1": (0, [0, 1, 2]), "2": (1, [1, 2]), "3": (0, [0, 2]), "4": (1, [2])}
"""Five layers: the dimension that each is cut along, and its workers."""


def stack_placement(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
    """Layers as in :data:`STACK`, in uneven parts."""
    tiles = {}
    for op in graph.operators:
        dim, workers = STACK[op.module_path]
        sets = spans(equal(7, len(workers)))
        tiles[op.name] = along(result_axis(op, dim), sets, workers) if len(workers) > 1 else copies(workers)
    return place(graph, tiles)


def test_S8_a_worker_runs_its_own_part_in_topological_order_and_backward_in_reverse() -> None:
    torch.manual_seed(0)
    parted = gp.partition(nn.Sequential(*(nn.Linear(7, 7) for _ in STACK)), 3, strategy=stack_placement)
    parted.record = True
    parted(torch.randn(7, 7)).square().sum().backward()
    program, events = parted.plan.program, parted.timeline().events
    layer = {op.name: op.module_path for op in parted.plan.graph.operators}
    for worker in range(3):
        forward = [e for e in events if e.device == worker and e.kind == "F"]
        backward = [e for e in events if e.device == worker and e.kind == "B"]
        ran = [layer[step.operator] for e in forward for step in program.segment[e.name].steps if not step.is_bridge]
        assert ran == [name for name, (_, workers) in STACK.items() if worker in workers]
        assert [e.name for e in backward] == [e.name for e in reversed(forward)]
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(forward + backward))
    at = {(e.kind, e.name): e for e in events}
    crossing = [w for w in program.wires if w.segment and w.differentiable]
    for wire in crossing:
        for reader in program.readers[wire.name]:  # whoever reads it ends after it was begun, also on another worker
            assert at["F", wire.segment].start_s < at["F", reader].end_s
            assert at["B", reader].start_s < at["B", wire.segment].end_s
    assert len(crossing) > 10
