"""Memory that a placement takes on each device, before anything runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from graphpart.cost.memory.recompute import members, recomputed
from graphpart.cost.memory.saved import Savings, total_bytes
from graphpart.cost.storage import ADAMW_BYTES_PER_ELEMENT, storage_roots
from graphpart.errors import ArgumentError, OutOfMemoryError
from graphpart.ir.cluster import Cluster, Device
from graphpart.ir.graph import DTYPE_BYTES, Graph, Source
from graphpart.ir.placement import Placement
from graphpart.ir.quantities import format_bytes
from graphpart.ir.region import Region


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of one device, by what fills it.

    Attributes:
        parameters_bytes: parameters at home there, and copies of others that are used there.
        gradients_bytes: their gradients.
        optimizer_bytes: optimizer state of the parameters at home there.
        buffers_bytes: buffers and constants, likewise.
        saved_bytes: activations kept for backward, and those of the largest group that is run again for it.
        bridges_bytes: messages that arrived and are not used yet; only known over time.
    """

    parameters_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    buffers_bytes: int = 0
    saved_bytes: int = 0
    bridges_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        stays = self.parameters_bytes + self.optimizer_bytes + self.buffers_bytes
        return stays + self.gradients_bytes + self.saved_bytes + self.bridges_bytes

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes by what they are for."""
        return {
            "parameters": self.parameters_bytes,
            "gradients": self.gradients_bytes,
            "optimizer state": self.optimizer_bytes,
            "buffers": self.buffers_bytes,
            "activations kept for backward": self.saved_bytes,
            "messages": self.bridges_bytes,
        }

    def __str__(self) -> str:
        named = [f"{format_bytes(n)} of {what}" for what, n in sorted(self.parts.items(), key=lambda p: -p[1]) if n]
        return ", ".join(named) or "nothing"


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """Memory per device.

    Attributes:
        devices: by device index.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element that were counted.
    """

    devices: tuple[DeviceMemory, ...]
    optimizer_bytes_per_element: float = ADAMW_BYTES_PER_ELEMENT

    @property
    def peak_bytes(self) -> int:
        """Of the fullest device."""
        return max(device.total_bytes for device in self.devices)

    def check(self, graph: Graph, placement: Placement, cluster: Cluster, memory_reserve: float = 0.0) -> None:
        """Raise if a device is too small.

        Args:
            graph: the model, to name what is large.
            placement: the placement that was forecast.
            cluster: the devices.
            memory_reserve: part of each device's memory to leave free, in ``[0, 1)``.

        Raises:
            OutOfMemoryError: naming the first device that is too small, the bytes and the largest contents.
        """
        for index, (memory, device) in enumerate(zip(self.devices, cluster.devices, strict=True)):
            limit = usable_bytes(device, memory_reserve)
            if memory.total_bytes > limit:
                there = [n for n, tiles in placement.tiles.items() if any(t.device == index for t in tiles)]
                raise out_of_memory(graph, device, memory, limit, there, self.optimizer_bytes_per_element)


def usable_bytes(device: Device, memory_reserve: float) -> int:
    """Bytes of a device that may be filled when a part of it, in ``[0, 1)``, stays free."""
    if not 0 <= memory_reserve < 1:
        raise ArgumentError(f"memory_reserve is {memory_reserve}; it is the part to leave free, in [0, 1)")
    return int(device.memory_bytes * (1 - memory_reserve))


def trains(graph: Graph) -> bool:
    """Whether a gradient flows anywhere in the graph."""
    return any(value.requires_grad for op in graph.operators for value in op.results)


def forecast_memory(
    graph: Graph,
    placement: Placement,
    num_devices: int,
    *,
    num_microbatches: int = 1,
    in_flight: float | Sequence[float] | None = None,
    optimizer_bytes_per_element: float = ADAMW_BYTES_PER_ELEMENT,
) -> MemoryForecast:
    """Forecast the memory of every device under a placement.

    A device keeps the union of what its operators save: views share the storage of what they look at, and
    parameters are not counted again. Operators that are run again for their backward keep what their group reads, and
    what the largest group saves is there once more, for one microbatch.

    Args:
        graph: the traced model.
        placement: where everything runs and lives.
        num_devices: devices of the cluster, used or not.
        num_microbatches: parts of the batch.
        in_flight: microbatches whose activations are kept at once, for all devices or for each; all by default,
            as in GPipe. A device that keeps some activations of a microbatch counts a part of it.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element; AdamW by default.
    """
    held_at_once = num_microbatches if in_flight is None else in_flight
    flights = [held_at_once] * num_devices if isinstance(held_at_once, (int, float)) else held_at_once
    parts = [min(n / num_microbatches, 1.0) for n in flights]
    held: list[defaultdict[str, int]] = [defaultdict(int) for _ in range(num_devices)]
    _hold_sources(held, graph, placement, optimizer_bytes_per_element)
    _hold_saved(held, graph, placement, parts, 1 / num_microbatches)
    return MemoryForecast(tuple(DeviceMemory(**contents) for contents in held), optimizer_bytes_per_element)


def forecast_together(forecasts: Sequence[tuple[Graph, Placement, MemoryForecast]]) -> MemoryForecast:
    """Forecast the memory of graphs that run one after the other, and all wait for backward.

    Args:
        forecasts: per graph, where it runs and what it takes for itself. What several read is held once.

    Raises:
        ValueError: if there are none.
    """
    if not forecasts:
        raise ValueError("no graph to forecast the memory of")
    first = forecasts[0][2]
    held: list[defaultdict[str, int]] = [defaultdict(int) for _ in first.devices]
    known: set[str] = set()
    for graph, placement, forecast in forecasts:
        _hold_sources(held, graph, placement, first.optimizer_bytes_per_element, known)
        known |= {source.value.name for source in graph.sources if source.kind in ("parameter", "buffer")}
        for device, memory in enumerate(forecast.devices):
            held[device]["saved_bytes"] += memory.saved_bytes
    return MemoryForecast(tuple(DeviceMemory(**contents) for contents in held), first.optimizer_bytes_per_element)


def _hold_sources(
    held: Sequence[defaultdict[str, int]],
    graph: Graph,
    placement: Placement,
    optimizer_bytes_per_element: float,
    known: Collection[str] = (),
) -> None:
    """Add parameters, gradients, optimizer state and buffers, but for those that are known.

    A device holds the parts at home there, and a copy of what its tiles read where no such part has it all.
    """
    training = trains(graph)
    for source in graph.sources:
        if source.kind == "input" or source.value.name in known:
            continue
        name, size = source.value.name, DTYPE_BYTES[source.value.dtype]
        at_home: defaultdict[int, list[Region]] = defaultdict(list)
        for shard in placement.home(source.value):
            at_home[shard.device].append(shard.region)
        num_held = {d: sum(region.num_elements for region in regions) for d, regions in at_home.items()}
        for device, region in _copies(graph, placement, name, at_home).items():
            num_held[device] = num_held.get(device, 0) + region.num_elements
        for device, num_elements in num_held.items():
            if source.kind != "parameter":
                held[device]["buffers_bytes"] += num_elements * size
                continue
            held[device]["parameters_bytes"] += num_elements * size
            if training and source.trainable:
                held[device]["gradients_bytes"] += num_elements * size
        for device, regions in at_home.items() if training else ():
            num_elements = sum(region.num_elements for region in regions)
            held[device]["optimizer_bytes"] += optimizer_bytes(source, optimizer_bytes_per_element, num_elements)


def _copies(
    graph: Graph, placement: Placement, name: str, at_home: Mapping[int, Sequence[Region]]
) -> Mapping[int, Region]:
    """Per device, what its tiles read of a source that no part at home there holds by itself, united."""
    found: dict[int, Region] = {}
    for op in graph.consumers[name]:
        for tile in placement.tiles[op.name]:
            region = tile.region(op, graph.values[name])
            if region and not any(region <= held for held in at_home.get(tile.device, ())):
                found[tile.device] = found[tile.device] | region if tile.device in found else region
    return found


def _hold_saved(
    held: Sequence[defaultdict[str, int]],
    graph: Graph,
    placement: Placement,
    parts: Sequence[float],
    part_of_one: float,
) -> None:
    """Add the storages that backward needs, each once per device, and those of the largest group that is run again."""
    savings = Savings(graph, placement, len(held))
    kept = savings.of(recomputed(graph, placement.recompute, placement).operators)
    for device, storages in enumerate(kept):
        held[device]["saved_bytes"] += total_bytes(storages, parts[device])
    again = [0] * len(held)
    for ops in members(graph, placement.recompute).values():
        for device, storages in enumerate(savings.of(ops)):
            fresh = {storage: n for storage, n in storages.items() if storage not in kept[device]}
            again[device] = max(again[device], total_bytes(fresh, part_of_one))
    for device, size_bytes in enumerate(again):
        held[device]["saved_bytes"] += size_bytes


def saved_roots(graph: Graph) -> Mapping[str, int]:
    """Bytes of every storage that some operator keeps for backward; parameters and buffers aside."""
    roots = storage_roots(graph)
    names = {roots[name] for op in graph.operators for name in op.saved if name in roots}
    return {
        name: graph.values[name].size_bytes
        for name in sorted(names)
        if name not in graph.source or graph.source[name].kind == "input"
    }


def optimizer_bytes(source: Source, bytes_per_element: float, num_elements: int | None = None) -> int:
    """Bytes of optimizer state of a parameter, or of so many of its elements; 0 for what isn't trained."""
    if source.kind != "parameter" or not source.trainable:
        return 0
    return ceil((source.value.num_elements if num_elements is None else num_elements) * bytes_per_element)


def out_of_memory(
    graph: Graph,
    device: Device,
    memory: DeviceMemory,
    limit_bytes: float,
    operator_names: Iterable[str],
    optimizer_bytes_per_element: float,
    advice: str = "",
) -> OutOfMemoryError:
    """The error for a device that is too small, naming what fills it and the three largest things on it.

    Args:
        graph: the traced model.
        device: the device that is too small.
        memory: what it would have to hold.
        limit_bytes: bytes that it may hold.
        operator_names: operators that would run there.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element that were counted.
        advice: what would fit; general advice if empty.
    """
    kept, roots, training = saved_roots(graph), storage_roots(graph), trains(graph)
    sizes: dict[str, int] = {}
    for name in operator_names:
        op = graph.operator[name]
        saved = {roots[v] for v in op.saved if roots.get(v) in kept}
        size_bytes = sum(kept[root] for root in saved) + op.saved_extra_bytes
        sizes[f"operator {op} keeps {format_bytes(size_bytes)} of activations"] = size_bytes
        for operand in op.operands:
            source = graph.source.get(operand)
            if source is None or source.kind == "input":
                continue
            size_bytes, what = source.value.size_bytes, ""
            if training and source.kind == "parameter" and source.trainable:
                size_bytes = 2 * size_bytes + optimizer_bytes(source, optimizer_bytes_per_element)
                what = " with its gradient and optimizer state"
            label = " = ".join(source.names) or operand
            sizes[f"{source.kind} {label} takes {format_bytes(size_bytes)}{what}"] = size_bytes
    largest = "; ".join(sorted(sizes, key=lambda label: -sizes[label])[:3])
    wanted_bytes = memory.total_bytes
    advice = advice or (
        "Use more or larger devices, a smaller batch, a lighter optimizer (optimizer_bytes_per_element) or a lower "
        "precision."
    )
    return OutOfMemoryError(
        f"{graph.name} does not fit: device {device.name!r} ({device.kind}) would need {format_bytes(wanted_bytes)} "
        f"and has {format_bytes(limit_bytes)}, {format_bytes(wanted_bytes - limit_bytes)} too few. "
        f"It would hold {memory}. Largest there: {largest}. {advice}"
    )
