"""Clusters as plain data: dictionaries for JSON plans, and TOML files that people write.

Both have one schema::

    name = "two unlike devices"

    [[device]]
    name = "cuda:0"
    kind = "H100"              # with a known kind, the figures below may be left out; kind CPU: a share of this host

    [[device]]
    name = "cpu:0"
    kind = "EPYC-7763"
    flops_per_s = { float32 = 2.0e12, bfloat16 = 2.0e12 }
    memory_bytes = 64_000_000_000
    memory_bandwidth_bytes_per_s = 100e9
    efficiency = 0.6           # optional
    overhead_s = 5e-6          # optional

    [link]                     # between any two devices not listed below
    latency_s = 10e-6
    bandwidth_bytes_per_s = 12e9

    [[links]]                  # one direction
    source = "cuda:0"
    destination = "cpu:0"
    latency_s = 10e-6
    bandwidth_bytes_per_s = 25e9

    [[shared]]                 # one message at a time, from any of these to any of those; optional
    name = "network card, out"
    sources = ["cuda:0", "cuda:1"]
    destinations = ["cuda:2", "cuda:3"]
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from graphpart.cost.devices.datasheets import CPU_LINK_LATENCY_S, CPU_MEMORY_BANDWIDTH_BYTES_PER_S, find_sheet
from graphpart.cost.devices.host import host_worker, is_cpu, known_kinds
from graphpart.errors import ClusterError, GraphError
from graphpart.ir.cluster import Cluster, Device, Link, SharedLink, check_count
from graphpart.ir.plain_data import check_plain

_DEVICE_KEYS = tuple(f.name for f in fields(Device))
_LINK_KEYS = tuple(f.name for f in fields(Link))


def load_toml(path: str | Path) -> Cluster:
    """Read a cluster from a TOML file.

    Args:
        path: of the file; this module's docstring shows the schema.

    Raises:
        ClusterError: if the file can't be read, or a key is unknown, missing, doubled or of the wrong type;
            the message names the file and the key.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ClusterError(f"cannot read the cluster file {str(path)!r}: {error.strerror or error}") from error
        check_plain(data)
    except (ValueError, RecursionError) as error:  # of what is no TOML, or a number of thousands of digits
        raise ClusterError(f"{path}: not a TOML file: {error}") from error
    except GraphError as error:
        raise ClusterError(f"{path}: {error}") from error
    return cluster_from_dict(data, where=str(path))


def dump_toml(cluster: Cluster) -> str:
    """A cluster as the text of a TOML file; :func:`load_toml` of it gives an equal cluster."""
    data = cluster_to_dict(cluster)
    parts = [f"name = {_toml(data['name'])}\n"]
    parts += [f"[[device]]\n{_toml_table(device)}" for device in data["device"]]
    parts.append(f"[link]\n{_toml_table(data['link'])}")
    for key in ("links", "shared"):
        parts += [f"[[{key}]]\n{_toml_table(table)}" for table in data[key]]
    return "\n".join(parts)


def cluster_to_dict(cluster: Cluster) -> dict[str, Any]:
    """A cluster as plain data, fit for JSON; :func:`cluster_from_dict` gives an equal cluster."""
    names = [device.name for device in cluster.devices]
    return {
        "name": cluster.name,
        "device": [
            {key: getattr(device, key) for key in _DEVICE_KEYS} | {"flops_per_s": dict(device.flops_per_s)}
            for device in cluster.devices
        ],
        "link": _link_to_dict(cluster.default_link),
        "links": [
            {"source": names[source], "destination": names[destination], **_link_to_dict(link)}
            for (source, destination), link in sorted(cluster.links.items())
        ],
        "shared": [
            {
                "name": link.name,
                "sources": [names[i] for i in sorted(link.sources)],
                "destinations": [names[i] for i in sorted(link.destinations)],
            }
            for link in cluster.shared
        ],
    }


def cluster_from_dict(data: Mapping[str, Any], where: str = "cluster") -> Cluster:
    """A cluster from plain data; this module's docstring shows the schema.

    Args:
        data: as :func:`cluster_to_dict` makes it.
        where: file or other origin, for messages.

    Raises:
        ClusterError: if a key is unknown, missing, doubled or of the wrong type; the message names it.
    """
    _check_keys(data, ("name", "device", "link", "links", "shared"), where)
    name = _text(data, "name", where) if "name" in data else ""
    tables = _tables(data, "device", where)
    check_count(len(tables))
    if not tables:
        raise ClusterError(f"{where}: no [[device]]; a cluster needs at least one device")
    num_workers = sum(is_cpu(str(table.get("kind"))) for table in tables)
    devices = tuple(_device(table, num_workers, f"{where}: [[device]] {i + 1}") for i, table in enumerate(tables))
    index: dict[str, int] = {}
    for i, device in enumerate(devices):
        if device.name in index:
            raise ClusterError(f"{where}: [[device]] {i + 1}: key 'name': {device.name!r} is taken already")
        index[device.name] = i
    if "link" in data:
        if not isinstance(data["link"], Mapping):
            raise ClusterError(f"{where}: key 'link' has to be a table [link]")
        default = _link(data["link"], f"{where}: [link]")
    elif len(devices) == 1:
        default = Link(CPU_LINK_LATENCY_S, CPU_MEMORY_BANDWIDTH_BYTES_PER_S)
    else:
        raise ClusterError(f"{where}: key 'link' is missing; [link] joins all devices that no [[links]] names")
    links: dict[tuple[int, int], Link] = {}
    for i, table in enumerate(_tables(data, "links", where)):
        at = f"{where}: [[links]] {i + 1}"
        _check_keys(table, ("source", "destination", *_LINK_KEYS), at)
        pair = (_device_index(table, "source", index, at), _device_index(table, "destination", index, at))
        if pair[0] == pair[1]:
            raise ClusterError(f"{at}: 'source' and 'destination' are both {table['source']!r}")
        if pair in links:
            raise ClusterError(f"{at}: the link {table['source']!r} -> {table['destination']!r} is given twice")
        links[pair] = _link({key: table[key] for key in _LINK_KEYS if key in table}, at)
    shared = [
        _shared(table, index, f"{where}: [[shared]] {i + 1}") for i, table in enumerate(_tables(data, "shared", where))
    ]
    return Cluster(devices, default, links, name, tuple(shared))


def _shared(table: Mapping[str, Any], index: Mapping[str, int], where: str) -> SharedLink:
    _check_keys(table, ("name", "sources", "destinations"), where)
    ends = [_device_indices(table, key, index, where) for key in ("sources", "destinations")]
    return SharedLink(_text(table, "name", where), *ends)


def _device(table: Mapping[str, Any], num_workers: int, where: str) -> Device:
    _check_keys(table, _DEVICE_KEYS, where)
    name = _text(table, "name", where)
    where = f"{where} ({name!r})"
    kind = _text(table, "kind", where)
    sheet = host_worker(0, num_workers) if is_cpu(kind) else find_sheet(kind)
    found: dict[str, Any] = {"name": name, "kind": kind}
    if sheet is not None:
        found["flops_per_s"] = dict(sheet.flops_per_s)
        found["memory_bytes"] = sheet.memory_bytes
        found["memory_bandwidth_bytes_per_s"] = sheet.memory_bandwidth_bytes_per_s
    if "flops_per_s" in table:
        rates = table["flops_per_s"]
        if not isinstance(rates, Mapping):
            raise ClusterError(f"{where}: key 'flops_per_s' has to be a table such as {{ float32 = 19.5e12 }}")
        found["flops_per_s"] = {dtype: _number(rates, dtype, f"{where}: flops_per_s") for dtype in rates}
    for key in ("memory_bandwidth_bytes_per_s", "efficiency", "overhead_s"):
        if key in table:
            found[key] = _number(table, key, where)
    if "memory_bytes" in table:
        found["memory_bytes"] = int(_number(table, "memory_bytes", where))
    missing = [k for k in ("flops_per_s", "memory_bytes", "memory_bandwidth_bytes_per_s") if k not in found]
    if missing:
        raise ClusterError(
            f"{where}: key {missing[0]!r} is missing, and there is no data sheet for kind {kind!r}; "
            f"known kinds are {known_kinds()}"
        )
    try:
        return Device(**found)
    except ClusterError as error:
        raise ClusterError(f"{where}: {error}") from error


def _link(table: Mapping[str, Any], where: str) -> Link:
    _check_keys(table, _LINK_KEYS, where)
    try:
        return Link(*(_number(table, key, where) for key in _LINK_KEYS))
    except ClusterError as error:
        raise error if where in str(error) else ClusterError(f"{where}: {error}") from error


def _link_to_dict(link: Link) -> dict[str, float]:
    return {key: getattr(link, key) for key in _LINK_KEYS}


def _check_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(str(key), list(known), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
            raise ClusterError(f"{where}: unknown key {key!r}; {hint}")


def _tables(data: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    tables = data.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise ClusterError(f"{where}: key {key!r} has to be a list of tables [[{key}]]")
    return tables


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    if key not in table:
        raise ClusterError(f"{where}: key {key!r} is missing")
    if not isinstance(table[key], str):
        raise ClusterError(f"{where}: key {key!r} has to be text, not {table[key]!r}")
    return table[key]


def _number(table: Mapping[str, Any], key: str, where: str) -> float:
    if key not in table:
        raise ClusterError(f"{where}: key {key!r} is missing")
    number = table[key]
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ClusterError(f"{where}: key {key!r} has to be a number, not {number!r}")
    if not abs(number) < float("inf"):
        raise ClusterError(f"{where}: key {key!r} has to be finite, not {number!r}")
    return number


def _device_index(table: Mapping[str, Any], key: str, index: Mapping[str, int], where: str) -> int:
    name = _text(table, key, where)
    if name not in index:
        raise ClusterError(f"{where}: key {key!r} names {name!r}; the devices are {', '.join(index)}")
    return index[name]


def _device_indices(table: Mapping[str, Any], key: str, index: Mapping[str, int], where: str) -> frozenset[int]:
    if not isinstance(table.get(key), list) or not table[key]:
        raise ClusterError(f"{where}: key {key!r} has to be a list of names of devices")
    return frozenset(_device_index({key: name}, key, index, where) for name in table[key])


def _toml_table(table: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_toml(value)}\n" for key, value in table.items())


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which JSON leaves as it is.
        return json.dumps(value).replace("\x7f", "\\u007f")
    return repr(value)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)
