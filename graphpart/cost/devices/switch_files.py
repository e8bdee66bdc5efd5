"""Switches as plain data: the tables ``[[switch]]``, one each, and ``[[tier]]``, for many that are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from graphpart.cost.devices.tables import boolean, check_keys, number, text, whole_number
from graphpart.errors import ClusterError
from graphpart.ir.topology import Switch

SWITCH_KEYS = tuple(field.name for field in fields(Switch))
TIER_KEYS = ("name", "size", *SWITCH_KEYS[2:])


def switches_to_list(switches: Sequence[Switch], device_names: Sequence[str]) -> list[dict[str, Any]]:
    """Switches as tables; devices by name."""
    return [
        {key: getattr(switch, key) for key in SWITCH_KEYS}
        | {"members": [m if isinstance(m, str) else device_names[m] for m in switch.members]}
        for switch in switches
    ]


def switches_from_tables(
    switches: Sequence[Mapping[str, Any]],
    tiers: Sequence[Mapping[str, Any]],
    index: Mapping[str, int],
    where: str,
) -> tuple[Switch, ...]:
    """Switches from tables of either kind.

    Args:
        switches: tables ``[[switch]]``.
        tiers: tables ``[[tier]]``.
        index: of each device, by name.
        where: the file, for messages.

    Raises:
        ClusterError: if a key is unknown, missing or of the wrong type; the message names it.
    """
    if switches and tiers:
        raise ClusterError(f"{where}: [[tier]] gives all switches; with [[switch]] beside it there would be others")
    if tiers:
        return _from_tiers(tiers, len(index), where)
    found = []
    for i, table in enumerate(switches):
        at = f"{where}: [[switch]] {i + 1}"
        check_keys(table, SWITCH_KEYS, at)
        members = table.get("members")
        if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
            raise ClusterError(f"{at}: key 'members' has to be a list of names of devices or switches")
        found.append(_switch(table, text(table, "name", at), tuple(index.get(m, m) for m in members), at))
    return tuple(found)


def _from_tiers(tiers: Sequence[Mapping[str, Any]], num_devices: int, where: str) -> tuple[Switch, ...]:
    """The switches of each tier, over neighbours of the tier below; the first one's are over devices."""
    found: list[Switch] = []
    below: list[int | str] = list(range(num_devices))
    for i, table in enumerate(tiers):
        at = f"{where}: [[tier]] {i + 1}"
        check_keys(table, TIER_KEYS, at)
        size = whole_number(table, "size", at) if "size" in table else len(below)
        if size < 1:
            raise ClusterError(f"{at}: key 'size' is {size}; a switch has at least one member")
        name = text(table, "name", at)
        groups = [tuple(below[first : first + size]) for first in range(0, len(below), size)]
        names = [name] if len(groups) == 1 else [f"{name} {number}" for number in range(len(groups))]
        found += [_switch(table, own, members, at) for own, members in zip(names, groups, strict=True)]
        below = list(names)
    return tuple(found)


def _switch(table: Mapping[str, Any], name: str, members: tuple[int | str, ...], where: str) -> Switch:
    given: dict[str, Any] = {key: number(table, key, where) for key in ("latency_s", "bandwidth_bytes_per_s")}
    if "ports" in table:
        given["ports"] = whole_number(table, "ports", where)
    if "oversubscription" in table:
        given["oversubscription"] = number(table, "oversubscription", where)
    if "peer_access" in table:
        given["peer_access"] = boolean(table, "peer_access", where)
    try:
        return Switch(name, members, **given)
    except ClusterError as error:
        raise ClusterError(f"{where}: {error}") from error
