"""Which modules lie on a device, in few words: ``transformer.h.0–5, transformer.ln_f``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from graphpart.ir.graph import Graph
from graphpart.ir.module_paths import prefixes


def module_ranges(
    graph: Graph, devices: Mapping[str, tuple[int, ...]], device: int, without: frozenset[str] = frozenset()
) -> list[str]:
    """Names of the largest modules whose operators lie on a device, runs of numbered siblings as one.

    A module that lies there only in part is named by its parts. Operators in no module are counted.

    Args:
        graph: the traced model.
        devices: per operator name, the devices that hold a tile of it.
        device: index of the device.
        without: operators that decide nothing, such as constants.
    """
    operators = [op for op in graph.operators if op.name not in without]
    here = [op for op in operators if device in devices[op.name]]
    elsewhere = {op.module_path for op in operators if device not in devices[op.name]}
    away = {prefix for path in elsewhere for prefix in prefixes(path)}
    parents = {prefix for path in {op.module_path for op in graph.operators} for prefix in prefixes(path)[:-1]}
    names: dict[str, None] = {}
    own = 0
    for op in here:
        whole = [p for p in prefixes(op.module_path) if p not in away]
        if whole:
            names[whole[0]] = None
        elif op.module_path and op.module_path not in parents:
            names[f"{op.module_path} (part)"] = None
        else:
            own += 1
    if not names and own:
        return [f"{here[0].name} … {here[-1].name}" if len(here) > 1 else here[0].name]
    return compress(_largest(names))


def _largest(names: Iterable[str]) -> list[str]:
    """Names that aren't inside another one of them."""
    known = set(names)
    return [name for name in names if not any(prefix in known for prefix in prefixes(name)[:-1])]


def compress(names: Sequence[str]) -> list[str]:
    """Consecutive numbered siblings as one: ``h.0, h.1, h.2`` becomes ``h.0–2``."""
    found: list[tuple[str, int | None, int | None]] = []
    for name in names:
        stem, dot, last = name.rpartition(".")
        number = int(last) if last.isdigit() else None
        if number is not None and found and found[-1][0] == stem + dot and found[-1][2] == number - 1:
            found[-1] = (stem + dot, found[-1][1], number)
        else:
            found.append((name, None, None) if number is None else (stem + dot, number, number))
    return [
        stem if low is None else f"{stem}{low}" if low == high else f"{stem}{low}–{high}" for stem, low, high in found
    ]
