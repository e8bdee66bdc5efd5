"""Groups of neurons with few weights between them, in linear layers whose weights a mask makes sparse (DistBelief).

Neurons of all such layers are the nodes of one graph, masked-in weights its edges. An ordering that keeps neighbours
together (by the Fiedler vector: Fiedler 1973) cuts every layer into shares; sweeps of assignments then move single
neurons to where most of their neighbours are. A group reads only the neurons that it has an edge from, so just those
cross between devices.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import LinAlgError, eigh
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.csgraph import connected_components, reverse_cuthill_mckee
from scipy.sparse.linalg import lobpcg

from graphpart.ir.graph import Graph, Operator
from graphpart.ir.region import Intervals

Masks = Mapping[str, np.ndarray]
"""Per mask, by value name: where it is not zero, ``[outputs, inputs]``."""

MAX_ASSIGNED = 2048
"""Neurons of a layer up to which sweeps improve the groups; an assignment takes cubic time."""

MIN_SPECTRAL = 3
"""Nodes from which on a graph has an order to find."""

MAX_DENSE = 600
"""Nodes up to which the Fiedler vector is computed exactly, in cubic time; beyond, it is iterated."""

MAX_PRODUCTS = 200_000_000
"""Products of edges that the iteration may take, within its own limits."""

_STEPS = (5, 200)
_SWEEPS = 4


@dataclass(frozen=True)
class MaskedLayer:
    """A linear layer whose weight is a parameter times a mask.

    Attributes:
        op: the operator.
        mask: where its weight may be other than zero, ``[outputs, inputs]``.
        before: the masked layer whose neurons are its inputs, one to one; None where they are other values.
    """

    op: Operator
    mask: np.ndarray
    before: MaskedLayer | None = None


@dataclass(frozen=True)
class Groups:
    """A layer's neurons by device.

    Attributes:
        outputs: per device, the neurons that it computes.
        inputs: per device, the neurons that these have an edge from.
    """

    outputs: tuple[Intervals, ...]
    inputs: tuple[Intervals, ...]


def neuron_groups(graph: Graph, masks: Masks, weights: Sequence[float]) -> Mapping[str, Groups]:
    """Groups for every masked layer that is large enough, by operator name.

    Args:
        graph: the traced model.
        masks: per mask, its pattern.
        weights: each device's share of every layer's neurons.
    """
    large: dict[str, MaskedLayer] = {}
    for layer in masked_layers(graph, masks):
        if layer.mask.shape[0] >= len(weights):
            before = None if layer.before is None else large.get(layer.before.op.name)
            large[layer.op.name] = replace(layer, before=before)
    layers = list(large.values())
    if not layers or len(weights) < 2:
        return {}
    place = _ordering(layers)
    ordered = {layer.op.name: _cut(place[layer.op.name], weights) for layer in layers}
    owner = _improve(layers, ordered, len(weights))
    found = {layer.op.name: _groups(layer, owner[layer.op.name], len(weights)) for layer in layers}
    return {name: groups for name, groups in found.items() if all(groups.outputs)}


def masked_layers(graph: Graph, masks: Masks) -> list[MaskedLayer]:
    """Linear layers with a masked weight, in topological order."""
    found: dict[str, MaskedLayer] = {}
    for op in graph.operators:
        if op.target != "aten.linear.default":
            continue
        weight = graph.producer.get(op.operands[1])
        if weight is None or weight.target != "aten.mul.Tensor":
            continue
        mask = next((masks[name] for name in weight.operands if name in masks), None)
        if mask is not None and mask.shape == graph.values[op.operands[1]].shape:
            before = _source_layer(graph, op.operands[0], found)
            found[op.name] = MaskedLayer(op, np.asarray(mask, dtype=bool), before)
    return list(found.values())


def num_crossings(layers: Sequence[MaskedLayer], owner: Mapping[str, np.ndarray]) -> int:
    """Values that cross between devices: each neuron once to every other device that has an edge from it."""
    total = 0
    for layer in layers:
        if layer.before is None:
            continue
        own, there = owner[layer.before.op.name], owner[layer.op.name]
        for device in range(int(max(own.max(), there.max())) + 1):
            total += int((layer.mask[there == device].any(0) & (own != device)).sum())
    return total


def _source_layer(graph: Graph, name: str, found: Mapping[str, MaskedLayer]) -> MaskedLayer | None:
    """The masked layer whose outputs a value holds in its last dimension, each where it was."""
    while (op := graph.producer.get(name)) is not None:
        if op.name in found:
            return found[op.name]
        if op.rule is None or not op.rule.results[0] or len(op.rule.results) != 1:
            return None
        features = op.rule.results[0][-1]
        carried = [
            operand
            for operand, dims in zip(op.operands, op.rule.operands, strict=True)
            if dims and dims[-1] == features and op.rule.can_cut(features[-1]) and len(features) == 1
        ]
        carried = [n for n in dict.fromkeys(carried) if n not in graph.source]
        if len(carried) != 1:
            return None
        (name,) = carried
    return None


def _ordering(layers: Sequence[MaskedLayer]) -> dict[str, np.ndarray]:
    """Per layer, each neuron's place in an ordering of all neurons that keeps neighbours together."""
    first: dict[str, int] = {}  # the number of a layer's first neuron, or of its first input
    ends, num_neurons = [], 0
    for layer in layers:
        outputs, inputs = layer.mask.shape
        names = [(layer.op.name, outputs)]
        names += [(f"{layer.op.name} inputs", inputs)] if layer.before is None else []
        for name, count in names:
            first[name], num_neurons = num_neurons, num_neurons + count
    for layer in layers:
        source = layer.before.op.name if layer.before is not None else f"{layer.op.name} inputs"
        there, here = np.nonzero(layer.mask)
        ends.append((there + first[layer.op.name], here + first[source]))
    rows, columns = (np.concatenate(side) for side in zip(*ends, strict=True))
    edges = coo_array((np.ones(len(rows)), (rows, columns)), shape=(num_neurons, num_neurons))
    neighbours = (edges + edges.T).tocsr()
    _, part_of = connected_components(neighbours, directed=False)
    members = np.split(np.argsort(part_of, kind="stable"), np.cumsum(np.bincount(part_of))[:-1])
    place = np.empty(num_neurons, dtype=int)
    # Large components first: small ones fill up what they leave of a share.
    order = sorted(members, key=lambda nodes: (-len(nodes), nodes[0]))
    place[np.concatenate([nodes[along(neighbours[nodes][:, nodes])] for nodes in order])] = np.arange(num_neurons)
    return {layer.op.name: place[first[layer.op.name] :][: layer.mask.shape[0]] for layer in layers}


def along(neighbours: csr_array) -> np.ndarray:
    """The nodes of a connected graph in an order that keeps neighbours together: by its Fiedler vector.

    The work is bounded: an eigenvector that is not found exactly in so many steps is taken as far as it came, and in
    its place, where there is none at all, an order by breadth (Cuthill and McKee, 1969).

    Args:
        neighbours: the graph's adjacency, symmetric.
    """
    num_nodes = neighbours.shape[0]
    if num_nodes < MIN_SPECTRAL:
        return np.arange(num_nodes)
    by_breadth = reverse_cuthill_mckee(neighbours.tocsr(), symmetric_mode=True)
    degrees = neighbours.sum(0)
    laplacian = diags_array(degrees) - neighbours
    if num_nodes <= MAX_DENSE:
        _, vectors = eigh(laplacian.toarray(), subset_by_index=[1, 1])
        digits = 9
    else:
        vectors, digits = _approximate(laplacian, degrees, by_breadth), 6
    fiedler = np.round(vectors[:, 0] / max(float(np.abs(vectors).max()), 1e-300), digits)
    if not np.isfinite(fiedler).all() or not fiedler.any():
        return by_breadth
    found = np.argsort(fiedler, kind="stable")
    return found if found[0] < found[-1] else found[::-1]


def _approximate(laplacian: csr_array, degrees: np.ndarray, by_breadth: np.ndarray) -> np.ndarray:
    """The Fiedler vector of a large graph, iterated from an order by breadth on; NaN where that breaks down."""
    num_nodes = len(degrees)
    start = np.random.default_rng(0).standard_normal((num_nodes, 3))
    start[by_breadth, 0] = np.linspace(-1, 1, num_nodes)
    steps = int(np.clip(MAX_PRODUCTS // (laplacian.nnz + num_nodes), *_STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not exact after so many steps is expected
        try:
            values, vectors = lobpcg(
                laplacian, start, M=diags_array(1 / degrees), Y=np.ones((num_nodes, 1)), largest=False, maxiter=steps
            )
        except (LinAlgError, ValueError):  # of directions that have become one
            return np.full((num_nodes, 1), np.nan)
    return vectors[:, [int(np.argmin(values))]]


def _cut(place: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The device of each neuron: shares of the ordering in proportion to the devices' weights."""
    bounds = np.round(np.cumsum(weights) / sum(weights) * len(place)).astype(int)
    owner = np.empty(len(place), dtype=int)
    owner[np.argsort(place)] = np.searchsorted(bounds, np.arange(len(place)), side="right")
    return owner


def _improve(
    layers: Sequence[MaskedLayer], owner: Mapping[str, np.ndarray], num_devices: int
) -> Mapping[str, np.ndarray]:
    """Reassign one layer after another to where its neighbours are, sizes kept, as long as fewer values cross."""
    best, best_crossings = dict(owner), num_crossings(layers, owner)
    for _ in range(_SWEEPS):
        trial = dict(best)
        for layer in layers:
            if layer.mask.shape[0] <= MAX_ASSIGNED:
                trial[layer.op.name] = _assign(layer, layers, trial, num_devices)
        found = num_crossings(layers, trial)
        if found >= best_crossings:
            break
        best, best_crossings = trial, found
    return best


def _assign(
    layer: MaskedLayer, layers: Sequence[MaskedLayer], owner: Mapping[str, np.ndarray], num_devices: int
) -> np.ndarray:
    """The assignment of a layer's neurons with the most neighbours on their own device."""
    now = owner[layer.op.name]
    neighbours = np.zeros((len(now), num_devices))
    for device in range(num_devices):
        if layer.before is not None:
            neighbours[:, device] += layer.mask[:, owner[layer.before.op.name] == device].sum(1)
        for after in layers:
            if after.before is layer:
                neighbours[:, device] += after.mask[owner[after.op.name] == device].sum(0)
    seats = np.sort(now)  # as many for each device as before
    rows, columns = linear_sum_assignment(neighbours[:, seats], maximize=True)
    found = now.copy()
    found[rows] = seats[columns]
    return found


def _groups(layer: MaskedLayer, owner: np.ndarray, num_devices: int) -> Groups:
    outputs, inputs = [], []
    for device in range(num_devices):
        mine = owner == device
        outputs.append(Intervals.indices(np.flatnonzero(mine).tolist()))
        # A group without any edge still has to read something: a product over nothing has no shape of its own.
        inputs.append(Intervals.indices(np.flatnonzero(layer.mask[mine].any(0)).tolist() or [0]))
    return Groups(tuple(outputs), tuple(inputs))
