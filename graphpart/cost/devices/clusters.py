"""Clusters from what a user writes: a count, device names, a preset such as ``8xH100``, or a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from graphpart.cost.devices.cluster_files import load_toml
from graphpart.cost.devices.datasheets import (
    GENERIC_CUDA,
    DataSheet,
    device_from_sheet,
    find_sheet,
)
from graphpart.cost.devices.host import host_worker, is_cpu, known_kinds
from graphpart.cost.devices.wiring import connect
from graphpart.errors import ClusterError
from graphpart.ir.cluster import MAX_DEVICES, Cluster, Device, check_count

Facts = Mapping[str, tuple[str, int]]
"""Per CUDA device name, its kind as CUDA reports it and its memory in bytes."""

MAX_SPEC = 400
"""Characters of a preset that a message shows."""

NODE_SIZE = 8
"""Devices in one node of a preset."""

_PART = re.compile(r"\s*0*(\d{1,18})\s*[x×]\s*(?:0*(\d{1,18})\s*[x×]\s*)?([A-Za-z][\w. -]*?)\s*")
_NAME = re.compile(r"(cpu(?!.*#)|cuda)(?::(\d+)(#\d+)?)?")


def make_cluster(
    spec: int | str | Path | Sequence[str] | Cluster, *, num_cuda_devices: int = 0, facts: Facts | None = None
) -> Cluster:
    """Build a cluster from what a user wrote.

    Args:
        spec: a number of devices (CUDA devices where there are that many, else CPU workers that share the
            host); device names such as ``["cuda:0", "cpu:0"]``, or ``["cuda:0#0", "cuda:0#1"]`` for workers that
            share one card evenly; one name; a preset (see :func:`preset`); the path of a TOML file; or a cluster,
            which is returned as it is.
        num_cuda_devices: CUDA devices of this host, as the caller found them.
        facts: kind and memory per CUDA device, as the caller found them; a device without facts is taken
            for an unknown, modest one.

    Raises:
        ClusterError: if the description is wrong; the message names what is wrong and what to write instead.
    """
    if isinstance(spec, Cluster):
        return spec
    if isinstance(spec, bool):
        raise ClusterError(f"devices={spec}: give a number of devices, device names, a preset or a TOML file")
    if isinstance(spec, int):
        return _from_count(spec, num_cuda_devices, facts or {})
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith(".toml")):
        return load_toml(spec)
    if isinstance(spec, str):
        if _NAME.fullmatch(spec):
            return _from_names([spec], facts or {})
        return preset(spec)
    if isinstance(spec, Sequence):
        return _from_names(spec, facts or {})
    raise ClusterError(
        f"cannot make a cluster of {spec!r}; give a number, device names such as ['cuda:0', 'cpu:0'], "
        "a preset such as '8xH100', the path of a .toml file, or a Cluster"
    )


def preset(text: str) -> Cluster:
    """A cluster by count and kind: ``8xH100``, ``64xH100``, ``16x4xH100``, ``4xA100-80GB+4xV100``, ``2xCPU``.

    Devices with NVLink come in nodes of eight of one kind, joined within by NVLink; others share nodes of eight over
    PCIe. ``16x4xH100`` is sixteen nodes of four. Between nodes is InfiniBand at 400 Gb/s, a card for each device. CPU
    workers share this host.

    Args:
        text: parts ``<count>x<kind>`` or ``<nodes>x<count>x<kind>``, joined by ``+``.

    Raises:
        ClusterError: if a part can't be read or a kind isn't known.
    """
    if not isinstance(text, str):
        raise ClusterError(f"{text!r} is no preset; write one such as '8xH100' or '4xA100+4xV100'")
    kinds: list[DataSheet | None] = []
    sizes: list[tuple[int, int] | None] = []
    for place, part in enumerate(text.split("+")):
        match = _PART.fullmatch(part)
        if not match or int(match[1]) < 1 or (match[2] and int(match[2]) < 1):
            if len(text) > MAX_SPEC:
                raise ClusterError(f"{text[:MAX_SPEC]!r}… is no preset; {MAX_DEVICES} devices are the most")
            raise ClusterError(
                f"cannot read {part!r} in {text!r} as a cluster; write a preset such as '8xH100' or '4xA100+4xV100', "
                "a device name such as 'cuda:0', or the path of a .toml file"
            )
        sheet = find_sheet(match[3])
        if sheet is None and not is_cpu(match[3]):
            raise ClusterError(f"{text!r}: no data sheet for {match[3]!r}; known kinds are {known_kinds()}")
        number = int(match[1]) * int(match[2] or 1)
        check_count(len(kinds) + number)
        kinds += [sheet] * number
        sizes += [(place, int(match[2])) if match[2] else None] * number
    num_workers = kinds.count(None)
    devices: list[Device] = []
    workers, cards = count(), count()
    for sheet in kinds:
        if sheet is None:
            devices.append(host_worker(next(workers), num_workers))
        else:
            devices.append(device_from_sheet(f"cuda:{next(cards)}", sheet))
    return connect(devices, kinds, _nodes(kinds, sizes), text)


def _from_count(number: int, num_cuda_devices: int, facts: Facts) -> Cluster:
    if number < 1:
        raise ClusterError(f"a cluster of {number} devices was asked for; at least one is needed")
    check_count(number)
    kind = "cuda" if num_cuda_devices >= number else "cpu"
    return _from_names([f"{kind}:{i}" for i in range(number)], facts)


def _from_names(names: Sequence[str], facts: Facts) -> Cluster:
    """A cluster of this host's devices, by name; ``cuda`` means ``cuda:0``, workers of one card share it evenly."""
    if not names:
        raise ClusterError("the list of devices is empty; give at least one name such as 'cpu:0'")
    check_count(len(names))
    full: list[tuple[str, int, str]] = []
    for name in names:
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if not match:
            raise ClusterError(f"{name!r} is no device name; write 'cpu:0', 'cpu:1', 'cuda:0', …")
        full.append((match[1], int(match[2] or 0), match[3] or ""))
    sharing = Counter((kind, index) for kind, index, _ in full)
    num_workers = sum(kind == "cpu" for kind, _, _ in full)
    devices: list[Device] = []
    sheets: list[DataSheet | None] = []
    for kind, index, part in full:
        if kind == "cpu":
            sheets.append(None)
            devices.append(host_worker(index, num_workers))
        else:
            name = f"cuda:{index}"
            reported, memory_bytes = facts.get(name, ("CUDA", None))
            sheet = find_sheet(reported) or GENERIC_CUDA
            sheets.append(sheet)
            whole = device_from_sheet(name + part, sheet, memory_bytes)
            devices.append(_share(whole, sharing[kind, index]))
    return connect(devices, sheets, [0] * len(devices), "")


def _share(device: Device, num_workers: int) -> Device:
    """What one of several workers on a card gets of it."""
    return replace(
        device,
        flops_per_s={dtype: rate / num_workers for dtype, rate in device.flops_per_s.items()},
        memory_bytes=device.memory_bytes // num_workers,
        memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s / num_workers,
    )


def _nodes(kinds: Sequence[DataSheet | None], sizes: Sequence[tuple[int, int] | None]) -> list[int]:
    """The node of each device of a preset; CPU workers belong to the first.

    Args:
        kinds: data sheet of each device; None for a CPU worker.
        sizes: where a part says how large its nodes are, the part's number and that size.
    """
    nodes: list[int] = []
    filled: Counter[object] = Counter()
    node_of: dict[object, int] = {}
    for sheet, size in zip(kinds, sizes, strict=True):
        if sheet is None:
            nodes.append(0)
            continue
        family = size or (sheet.kind if sheet.peer else "PCIe")
        key = (family, filled[family] // (size[1] if size else NODE_SIZE))
        filled[family] += 1
        nodes.append(node_of.setdefault(key, len(node_of)))
    return nodes
