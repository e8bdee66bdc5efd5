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

Devices that are alike, and the switches that join them, go in few lines (``docs/clusters.md`` has examples)::

    [[device]]
    name = "cuda:0"
    kind = "H100"
    count = 64                 # cuda:0 to cuda:63

    [[tier]]                   # a switch for every eight neighbours; instead of [link]
    name = "node"
    size = 8                   # members of one switch; all if it is left out
    latency_s = 5e-6
    bandwidth_bytes_per_s = 450e9  # of one port of a member, each way

    [[tier]]                   # over the switches of the tier before
    name = "InfiniBand"
    latency_s = 10e-6
    bandwidth_bytes_per_s = 50e9
    ports = 8                  # of each member: eight network cards a node; 1 if it is left out
    oversubscription = 2.0     # all ports of a member together carry half of it; 1 if it is left out
    peer_access = true         # false: messages turn around above, at the host, say; optional

    [[switch]]                 # instead of [[tier]]: one switch, over devices or switches that are named
    name = "PCIe 0"
    members = ["cuda:0", "cuda:1"]
    latency_s = 10e-6
    bandwidth_bytes_per_s = 31.5e9
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from graphpart.cost.devices.datasheets import CPU_LINK_LATENCY_S, CPU_MEMORY_BANDWIDTH_BYTES_PER_S, find_sheet
from graphpart.cost.devices.host import host_worker, is_cpu, known_kinds
from graphpart.cost.devices.switch_files import switches_from_tables, switches_to_list
from graphpart.cost.devices.tables import check_keys, number, tables, text, whole_number
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
    for key in ("links", "shared", "switch"):
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
        "switch": switches_to_list(cluster.switches, names),
    }


def cluster_from_dict(data: Mapping[str, Any], where: str = "cluster") -> Cluster:
    """A cluster from plain data; this module's docstring shows the schema.

    Args:
        data: as :func:`cluster_to_dict` makes it.
        where: file or other origin, for messages.

    Raises:
        ClusterError: if a key is unknown, missing, doubled or of the wrong type; the message names it.
    """
    check_keys(data, ("name", "device", "link", "links", "shared", "switch", "tier"), where)
    name = text(data, "name", where) if "name" in data else ""
    rows = _rows(tables(data, "device", where), where)
    num_workers = sum(is_cpu(str(table.get("kind"))) for _, table in rows)
    devices = tuple(_device(table, num_workers, at) for at, table in rows)
    index: dict[str, int] = {}
    for i, device in enumerate(devices):
        if device.name in index:
            raise ClusterError(f"{rows[i][0]}: key 'name': {device.name!r} is taken already")
        index[device.name] = i
    switches = switches_from_tables(tables(data, "switch", where), tables(data, "tier", where), index, where)
    if "link" in data:
        if not isinstance(data["link"], Mapping):
            raise ClusterError(f"{where}: key 'link' has to be a table [link]")
        default = _link(data["link"], f"{where}: [link]")
    elif len(devices) == 1:
        default = Link(CPU_LINK_LATENCY_S, CPU_MEMORY_BANDWIDTH_BYTES_PER_S)
    elif switches:
        default = Link(switches[-1].latency_s, switches[-1].bandwidth_bytes_per_s)
    else:
        raise ClusterError(f"{where}: key 'link' is missing; [link] joins all devices that no [[links]] names")
    links: dict[tuple[int, int], Link] = {}
    for i, table in enumerate(tables(data, "links", where)):
        at = f"{where}: [[links]] {i + 1}"
        check_keys(table, ("source", "destination", *_LINK_KEYS), at)
        pair = (_device_index(table, "source", index, at), _device_index(table, "destination", index, at))
        if pair[0] == pair[1]:
            raise ClusterError(f"{at}: 'source' and 'destination' are both {table['source']!r}")
        if pair in links:
            raise ClusterError(f"{at}: the link {table['source']!r} -> {table['destination']!r} is given twice")
        links[pair] = _link({key: table[key] for key in _LINK_KEYS if key in table}, at)
    shared = [
        _shared(table, index, f"{where}: [[shared]] {i + 1}") for i, table in enumerate(tables(data, "shared", where))
    ]
    try:
        cluster = Cluster(devices, default, links, name, tuple(shared), switches)
    except ClusterError as error:
        raise ClusterError(f"{where}: {error}") from error
    if switches and "link" not in data and (apart := cluster.topology.apart()) is not None:
        one, other = (devices[i].name for i in apart)
        raise ClusterError(f"{where}: no switch joins {one!r} and {other!r}; add one, or a [link] for such devices")
    return cluster


def _rows(given: Sequence[Mapping[str, Any]], where: str) -> list[tuple[str, dict[str, Any]]]:
    """A table for each device, and where it is; one with a ``count`` stands for so many, numbered on from its own."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for i, table in enumerate(given):
        at, row = f"{where}: [[device]] {i + 1}", dict(table)
        count = whole_number(row, "count", at) if "count" in row else 1
        if count < 1:
            raise ClusterError(f"{at}: key 'count' is {count}; leave the table out for no device")
        check_count(len(rows) + count)
        if row.pop("count", None) is None:
            rows.append((at, row))
            continue
        stem, colon, first = text(row, "name", at).rpartition(":")
        if not (colon and first.isdecimal() and len(first) < 10):
            raise ClusterError(f"{at}: key 'name' has to end in a number, as 'cuda:0' does, for 'count' to go on from")
        rows += [(at, row | {"name": f"{stem}:{int(first) + k}"}) for k in range(count)]
    if not rows:
        raise ClusterError(f"{where}: no [[device]]; a cluster needs at least one device")
    return rows


def _shared(table: Mapping[str, Any], index: Mapping[str, int], where: str) -> SharedLink:
    check_keys(table, ("name", "sources", "destinations"), where)
    ends = [_device_indices(table, key, index, where) for key in ("sources", "destinations")]
    return SharedLink(text(table, "name", where), *ends)


def _device(table: Mapping[str, Any], num_workers: int, where: str) -> Device:
    check_keys(table, _DEVICE_KEYS, where)
    name = text(table, "name", where)
    where = f"{where} ({name!r})"
    kind = text(table, "kind", where)
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
        found["flops_per_s"] = {dtype: number(rates, dtype, f"{where}: flops_per_s") for dtype in rates}
    for key in ("memory_bandwidth_bytes_per_s", "efficiency", "overhead_s"):
        if key in table:
            found[key] = number(table, key, where)
    if "memory_bytes" in table:
        found["memory_bytes"] = int(number(table, "memory_bytes", where))
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
    check_keys(table, _LINK_KEYS, where)
    try:
        return Link(*(number(table, key, where) for key in _LINK_KEYS))
    except ClusterError as error:
        raise error if where in str(error) else ClusterError(f"{where}: {error}") from error


def _link_to_dict(link: Link) -> dict[str, float]:
    return {key: getattr(link, key) for key in _LINK_KEYS}


def _device_index(table: Mapping[str, Any], key: str, index: Mapping[str, int], where: str) -> int:
    name = text(table, key, where)
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
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which JSON leaves as it is.
        return json.dumps(value).replace("\x7f", "\\u007f")
    return repr(value)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)
