"""Groups of neurons with few weights between them, in linear layers whose weights a mask makes sparse (DistBelief).

Neurons of all such layers are the nodes of one graph, masked-in weights its edges. An ordering that keeps neighbours
together (by the Fiedler vector: Fiedler 1973) cuts every layer into shares; sweeps of assignments then move single
neurons to where most of their neighbours are. A group reads only the neurons that it has an edge from, so just those
cross between devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from scipy.optimize import linear_sum_assignment

from graphpart.ir.graph import Graph, Operator
from graphpart.ir.region import Intervals

Masks = Mapping[str, np.ndarray]
"""Per mask, by value name: where it is not zero, ``[outputs, inputs]``."""

MAX_ASSIGNED = 2048
"""Neurons of a layer up to which sweeps improve the groups; an assignment takes cubic time."""

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
    layers = [layer for layer in masked_layers(graph, masks) if layer.mask.shape[0] >= len(weights)]
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
    neurons = nx.Graph()
    for layer in layers:
        neurons.add_nodes_from((layer.op.name, j) for j in range(layer.mask.shape[0]))
        source = layer.before.op.name if layer.before is not None else f"{layer.op.name} inputs"
        for j, i in np.argwhere(layer.mask).tolist():
            neurons.add_edge((layer.op.name, j), (source, i))
    place: dict[tuple[str, int], int] = {}
    # Large components first: small ones fill up what they leave of a share.
    for nodes in sorted(nx.connected_components(neurons), key=lambda nodes: (-len(nodes), min(nodes))):
        # Sets of names come in another order in each process, but all processes have to find the same groups.
        part = nx.Graph()
        part.add_nodes_from(sorted(nodes))
        part.add_edges_from(sorted(tuple(sorted(edge)) for edge in neurons.edges(nodes)))
        order = list(part)
        if len(order) > 2:
            along = np.round(nx.fiedler_vector(part, seed=0), 9).tolist()
            order = [node for _, node in sorted(zip(along, order, strict=True))]
        for node in order if order[0] < order[-1] else reversed(order):
            place[node] = len(place)
    return {layer.op.name: np.array([place[layer.op.name, j] for j in range(layer.mask.shape[0])]) for layer in layers}


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
