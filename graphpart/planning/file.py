"""Plans as JSON files that survive versions: unknown keys are ignored, missing ones take their defaults."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from graphpart.cost import cluster_from_dict, cluster_to_dict
from graphpart.draw.words.text import shorten
from graphpart.errors import GraphpartError, PlanError
from graphpart.ir.cluster import Cluster, Device, Link, SharedLink
from graphpart.ir.placement import Placement
from graphpart.ir.plain_data import check_plain
from graphpart.ir.topology import Switch
from graphpart.order import Async
from graphpart.planning.border import check_graph, check_size
from graphpart.planning.choices import Choices
from graphpart.planning.codec import (
    decode,
    encode,
    graph_from_dict,
    graph_to_dict,
    placement_from_dict,
    placement_to_dict,
)
from graphpart.planning.plan import Plan
from graphpart.planning.reads import get, item
from graphpart.strategies import Candidate, is_named

FORMAT = "graphpart-plan"

VERSION = 2
"""Raised when a file's old keys change their meaning; a new key alone needs no new version."""

MAX_MESSAGE = 800
"""Columns of what is said about a damaged plan, which may quote any text of it."""

_OPEN_LEVELS = 3
"""Down to this depth, each entry has its own line: one a section, one an operator."""


def save_plan(plan: Plan, path: str | Path) -> Path:
    """Write a plan, with its graph and its cluster, as JSON.

    The file is written beside its place and then moved there, so that a reader never meets half a file.

    Args:
        plan: the plan.
        path: of the file; missing folders are made.

    Returns:
        The path.

    Raises:
        PlanError: if the file cannot be written, or the plan holds something that JSON cannot.
    """
    path = Path(path)
    try:
        data = _plan_to_dict(plan)
        cluster_from_dict(data["cluster"])
        text = _layout(data) + "\n"
    except (GraphpartError, TypeError, ValueError) as error:
        raise PlanError(f"cannot save the plan to {str(path)!r}: {error}") from error
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise PlanError(f"cannot write the plan {str(path)!r}: {error.strerror or error}") from error
    return path


def load_plan(path: str | Path) -> Plan:
    """Read a plan that :func:`save_plan` wrote; needs neither the model nor torch.

    Args:
        path: of the file.

    Raises:
        PlanError: if the file cannot be read, is no plan or is of a later version; it names the file and what is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise PlanError(f"cannot read the plan {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not a plan: not a JSON file ({error})") from error
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise PlanError(f'{path}: not a plan: a plan is a JSON object with "format": "{FORMAT}"')
    version = data.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise PlanError(f"{path}: not a plan: its version is {version!r}, not a number from 1 up")
    if version > VERSION:
        raise PlanError(
            f"{path}: a plan of version {version}, from a later graphpart; this one reads version {VERSION}. "
            "Upgrade graphpart, or plan again"
        )
    try:
        check_plain(data)
        plan = _plan_from_dict(data)
        check_size(plan.placement, plan.num_microbatches, len(text))
        return plan
    except (GraphpartError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise PlanError(f"{path}: the plan is damaged: {shorten(str(error), MAX_MESSAGE)}") from error


def _plan_to_dict(plan: Plan) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "strategy": plan.strategy,
        "choices": _choices_to_dict(plan.choices),
        "candidates": [
            {"strategy": c.strategy, "step_s": encode(c.step_s), "reason": c.reason} for c in plan.candidates
        ],
        "notes": list(plan.notes),
        "cluster": cluster_to_dict(plan.cluster),
        "placement": placement_to_dict(plan.placement),
        "graph": graph_to_dict(plan.graph),
    }


def _choices_to_dict(choices: Choices) -> dict[str, Any]:
    """The choices by name; a strategy that has no name is the placement, which the file has anyway."""
    found = {field.name: getattr(choices, field.name) for field in fields(Choices)}
    found["strategy"] = choices.strategy if isinstance(choices.strategy, str) else None
    found["schedule"] = asdict(choices.schedule) if isinstance(choices.schedule, Async) else choices.schedule
    return found


def _plan_from_dict(data: Mapping[str, Any]) -> Plan:
    placement = _section(data, "placement", placement_from_dict)
    plan = Plan(
        graph=_section(data, "graph", graph_from_dict),
        cluster=_section(data, "cluster", _cluster_from_dict),
        placement=placement,
        strategy=get(data, "strategy", str, ""),
        # The first version had them beside one another, with the name of what made the plan for a strategy.
        choices=_choices_from_dict(get(data, "choices", Mapping, data), placement),
        candidates=tuple(
            Candidate(get(row, "strategy", str), _seconds(row), get(row, "reason", str, ""))
            for row in map(partial(item, kind=Mapping), get(data, "candidates", list, []))
        ),
        notes=tuple(item(note, str) for note in get(data, "notes", list, [])),
    )
    check_graph(plan.graph)
    plan.placement.check(plan.graph, len(plan.cluster))
    return plan


def _seconds(candidate: Mapping[str, Any]) -> float | None:
    found = decode(candidate.get("step_s"))
    return None if found is None else item(found, float)


def _choices_from_dict(data: Mapping[str, Any], placement: Placement) -> Choices:
    """The choices that are there; a later version's are passed over.

    Args:
        data: values by name.
        placement: the strategy of a plan whose own has no name.
    """
    found = {field.name: data[field.name] for field in fields(Choices) if field.name in data}
    if not is_named(found.get("strategy")):
        found["strategy"] = placement
    if isinstance(found.get("schedule"), Mapping):
        found["schedule"] = Async(**found["schedule"])
    return Choices(**found)


def _section(data: Mapping[str, Any], key: str, read: Any) -> Any:
    try:
        return read(get(data, key, Mapping))
    except GraphpartError as error:
        raise PlanError(f"{key}: {error}") from error


def _cluster_from_dict(data: Mapping[str, Any]) -> Cluster:
    """A cluster; in TOML files an unknown key is a slip of the pen, here it is a later version's."""
    link = tuple(f.name for f in fields(Link))
    known = _only(data, ("name", "device", "link", "links", "shared", "switch"))
    known["device"] = [_only(row, tuple(f.name for f in fields(Device))) for row in get(data, "device", list)]
    if "link" in data:
        known["link"] = _only(get(data, "link", Mapping), link)
    known["links"] = [_only(row, ("source", "destination", *link)) for row in get(data, "links", list, [])]
    shared = tuple(f.name for f in fields(SharedLink))
    known["shared"] = [_only(row, shared) for row in get(data, "shared", list, [])]
    switch = tuple(f.name for f in fields(Switch))
    known["switch"] = [_only(row, switch) for row in get(data, "switch", list, [])]
    return cluster_from_dict(known)


def _only(data: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: data[key] for key in keys if key in data}


def _layout(data: Any, depth: int = 0) -> str:
    """JSON with one line an operator: short enough to store, plain enough to read and to compare."""
    nested = isinstance(data, (dict, list)) and bool(data) and depth < _OPEN_LEVELS
    if not nested:
        return json.dumps(
            data, ensure_ascii=False, allow_nan=False, separators=(",", ":") if depth > 2 else (", ", ": ")
        )
    margin = " " * (depth + 1)
    if isinstance(data, dict):
        rows = [
            f"{margin}{json.dumps(key, ensure_ascii=False)}: {_layout(item, depth + 1)}" for key, item in data.items()
        ]
        return "{\n" + ",\n".join(rows) + "\n" + margin[1:] + "}"
    rows = [margin + _layout(item, depth + 1) for item in data]
    return "[\n" + ",\n".join(rows) + "\n" + margin[1:] + "]"
