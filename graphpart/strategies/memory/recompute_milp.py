"""The least recomputation that fits: which modules run again, as an integer program.

A storage is kept where an operator that saves it does not run again, or where a module that runs again reads it. The
module that saves most while it runs again comes on top. Of modules inside each other, one at most is chosen. The time
of one more forward is least; HiGHS (Q. Huangfu, J. Hall, 2018) proves it so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from graphpart.cost.memory.recompute import members, recomputed, rerun_s, run_again
from graphpart.cost.memory.saved import Savings, Storage
from graphpart.cost.time.roofline import operator_works
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.memory.recompute_blocks import Modules, largest_bytes, modules_of
from graphpart.strategies.memory.terms import Terms

LONGEST_S = 20.0
"""Seconds after which the best choice found so far is taken."""

_TOLERANCE = 2e-6
"""Of what HiGHS takes to fit, relative to the largest device."""

Options = frozenset[int]
"""Modules, by number, that an operator is in."""


def least_recomputation(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    limits: Sequence[float],
    terms: Terms,
    *,
    in_flight: Sequence[float] | None = None,
) -> Placement | None:
    """A placement that fits, with least time spent on running modules again; None where no choice fits.

    Args:
        graph: the traced model.
        placement: where everything runs; groups that it recomputes stay.
        cluster: the devices.
        limits: bytes that each device may hold.
        terms: what to count with.
        in_flight: per device, microbatches whose activations it keeps at once; all by default.
    """
    savings = Savings(graph, placement, len(cluster))
    nothing = replace(graph, operators=tuple(replace(op, saved=(), saved_extra_bytes=0) for op in graph.operators))
    num_microbatches = terms.num_microbatches
    held = terms.memory(nothing, replace(placement, recompute={}), cluster)
    room = [limit - device.total_bytes for limit, device in zip(limits, held.devices, strict=True)]
    modules = modules_of(graph, placement.recompute)
    works = operator_works(graph)
    costs_s = [sum(rerun_s(ops, placement, cluster, works, num_microbatches).values()) for ops in modules.values()]
    problem = _RerunProblem(costs_s)
    fixed = members(graph, placement.recompute)
    for device, size_bytes in enumerate(largest_bytes(savings, fixed, num_microbatches)):
        problem.largest.append(size_bytes)
        problem.room.append(room[device])
    flights = [num_microbatches] * len(cluster) if in_flight is None else in_flight
    for storage in _storages(graph, placement, savings, modules):
        kept = min(flights[storage.device] / num_microbatches, 1.0)
        problem.add(storage, *((kept, 1 / num_microbatches) if storage.parted else (1.0, 1.0)))
    for options in {options for _, options in _options(graph, modules)}:
        problem.exclude(options)
    chosen = problem.solve()
    if chosen is None:
        return None
    paths = list(modules)
    groups = {op.name: paths[i] for i in chosen for op in modules[paths[i]]}
    return replace(placement, recompute={**placement.recompute, **groups})


@dataclass(frozen=True)
class _Kept:
    """A storage on a device, and what decides whether it is kept.

    Attributes:
        device: where.
        size_bytes: for the whole batch.
        parted: whether a microbatch has only its part of it.
        savers: per operator that saves it, the modules it is in.
        readers: modules that read it.
    """

    device: int
    size_bytes: int
    parted: bool
    savers: frozenset[Options]
    readers: Options


def _options(graph: Graph, modules: Modules) -> Iterable[tuple[str, Options]]:
    """Per operator, the modules it is in."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for number, ops in enumerate(modules.values()):
        for op in ops:
            found[op.name].add(number)
    for op in graph.operators:
        yield op.name, frozenset(found[op.name])


def _storages(graph: Graph, placement: Placement, savings: Savings, modules: Modules) -> Iterable[_Kept]:
    """Every storage that is kept under some choice, on every device."""
    sizes: defaultdict[tuple[int, Storage], int] = defaultdict(int)
    savers: defaultdict[tuple[int, Storage], set[Options]] = defaultdict(set)
    readers: defaultdict[tuple[int, Storage], set[int]] = defaultdict(set)
    options = dict(_options(graph, modules))
    for op in recomputed(graph, placement.recompute, placement).operators:
        for device, found in enumerate(savings.of([op])):
            for storage, size_bytes in found.items():
                sizes[device, storage] = max(sizes[device, storage], size_bytes)
                savers[device, storage].add(options[op.name])
    for number, ops in enumerate(modules.values()):
        for device, found in enumerate(savings.of(run_again(graph, ops, placement))):
            for storage, size_bytes in found.items():
                sizes[device, storage] = max(sizes[device, storage], size_bytes)
                readers[device, storage].add(number)
    for (device, storage), size_bytes in sizes.items():
        key = (device, storage)
        yield _Kept(device, size_bytes, storage.parted, frozenset(savers[key]), frozenset(readers[key]))


@dataclass
class _RerunProblem:
    """The integer program; storages that the same modules decide on are one.

    Attributes:
        costs_s: per module, the time to run it again.
        room: per device, bytes for what is kept.
        largest: per device, the most that a group saves which runs again anyway.
    """

    costs_s: Sequence[float]
    room: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    sizes: dict[tuple[int, frozenset[Options], Options], tuple[float, float]] = field(default_factory=dict)
    exclusive: list[Options] = field(default_factory=list)

    def add(self, storage: _Kept, kept: float, one: float) -> None:
        """A storage, of which a part is kept at once, and one microbatch has a part."""
        key = (storage.device, storage.savers, storage.readers)
        before, before_one = self.sizes.get(key, (0.0, 0.0))
        self.sizes[key] = (before + storage.size_bytes * kept, before_one + storage.size_bytes * one)

    def exclude(self, options: Options) -> None:
        """Of these modules, one at most may run again."""
        if len(options) > 1:
            self.exclusive.append(options)

    def solve(self) -> list[int] | None:
        """The modules to run again; None where nothing fits."""
        num_modules, num_devices = len(self.costs_s), len(self.room)
        # Variables: a module runs again; a class of storages is kept; per device, the most that runs again saves.
        first_kept, first_largest = num_modules, num_modules + len(self.sizes)
        num_variables = first_largest + num_devices
        unit = max([1.0, *map(abs, self.room)])
        rows = _Rows(num_variables)
        again: defaultdict[tuple[int, int], dict[int, float]] = defaultdict(dict)
        held: list[dict[int, float]] = [{first_largest + d: 1.0} for d in range(num_devices)]
        for number, ((device, savers, readers), (whole, one)) in enumerate(self.sizes.items()):
            kept = first_kept + number
            held[device][kept] = whole / unit
            for options in savers:
                rows.at_least(1.0, {kept: 1.0, **dict.fromkeys(options, 1.0)})
            for module in readers:
                rows.at_least(0.0, {kept: 1.0, module: -1.0})
            for module in frozenset[int]().union(*savers):
                terms = again[device, module]
                terms[module] = terms.get(module, 0.0) - one / unit
                terms[kept] = one / unit
        for (device, _), terms in again.items():
            rows.at_least(0.0, {**terms, first_largest + device: 1.0})
        for device, terms in enumerate(held):
            rows.at_least(_TOLERANCE - self.room[device] / unit, {name: -size for name, size in terms.items()})
        for options in self.exclusive:
            rows.at_least(-1.0, dict.fromkeys(options, -1.0))
        lower = np.zeros(num_variables)
        lower[first_largest:] = np.array(self.largest) / unit
        upper = np.ones(num_variables)
        upper[first_largest:] = np.inf
        costs = np.zeros(num_variables)
        costs[:num_modules] = np.array(self.costs_s) / max([*self.costs_s, 1e-30])
        whole_numbers = np.zeros(num_variables)
        whole_numbers[:num_modules] = 1
        found = milp(
            costs,
            constraints=rows.constraint(),
            integrality=whole_numbers,
            bounds=Bounds(lower, upper),
            options={"time_limit": LONGEST_S, "mip_rel_gap": 1e-6},
        )
        return None if found.x is None else [i for i in range(num_modules) if found.x[i] > 0.5]


class _Rows:
    """Rows of a sparse matrix, each with the least value that it may have."""

    def __init__(self, num_columns: int) -> None:
        self.num_columns = num_columns
        self.least: list[float] = []
        self.entries: list[tuple[int, int, float]] = []

    def at_least(self, least: float, terms: Mapping[int, float]) -> None:
        self.entries += [(len(self.least), column, value) for column, value in terms.items()]
        self.least.append(least)

    def constraint(self) -> LinearConstraint:
        rows, columns, values = zip(*self.entries, strict=True) if self.entries else ((), (), ())
        matrix = csr_array((values, (rows, columns)), shape=(len(self.least), self.num_columns))
        return LinearConstraint(matrix, np.array(self.least), np.inf)
