"""Damaged and hostile files of plans and clusters: a named error, soon, or all that a good file gives.

``python -m tests.test_bad_files --examples 3000 --seed 0`` tries more of them.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import graphpart as gp
from graphpart.cli.main import main
from graphpart.cost.devices.cluster_files import dump_toml
from graphpart.errors import ClusterError, GraphError, OutOfMemoryError, PlacementError, PlanError
from graphpart.ir.cluster import MAX_DEVICES
from graphpart.ir.plain_data import MAX_TEXT, check_plain
from tests.helpers.mutants import deep, mutant
from tests.helpers.time_limit import time_limit

DATA = Path(__file__).parent / "data"
PLANS = tuple(sorted(DATA.glob("plan_*.json")))
LIMIT_S = 60.0
MORE_BYTES = 400e6
HOSTILE = '<<B>x</B>>, URL="javascript:alert(document.domain)", image="secret.png"] //'
CONTROL = "a\x1b[31mred\x07\x00b"


@cache
def _plan(number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PLANS[number % len(PLANS)].read_text())
    return found


def use(path: Path) -> None:
    """All that a plan's file is read for."""
    plan = gp.Plan.load(path)
    plan.explain()
    plan.dot()
    plan.dot(bridges=True)
    timeline = gp.simulate(plan)
    str(timeline)
    timeline.draw(path.with_suffix(".svg"))
    timeline.save_trace(path.with_suffix(".trace.json"))
    plan.save(path.with_suffix(".again.json"))


def try_plan(number: int, folder: Path) -> str:
    """What comes of a damaged plan: ``fine`` or the name of an error of ours; another error is raised."""
    path = folder / "plan.json"
    path.write_text(json.dumps(mutant(_plan(number), number)), encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with time_limit(LIMIT_S):
            use(path)
        return "fine"
    except gp.GraphpartError as error:
        return type(error).__name__
    finally:
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MORE_BYTES


CLUSTER = gp.make_cluster("2xH100+1xCPU")


def try_cluster(number: int, folder: Path) -> str:
    """Likewise of a damaged file of a cluster; every third one is damaged as text."""
    from graphpart.cost import cluster_to_dict

    path = folder / "cluster.toml"
    if number % 3:
        data = mutant(cluster_to_dict(CLUSTER), number)
        text = "\n".join(f"{key} = {_toml(value)}" for key, value in data.items()) if isinstance(data, dict) else ""
    else:
        text = (
            "".join(map(str, mutant(list(dump_toml(CLUSTER)), number, most=8))) if number % 2 else "a = " + "[" * 5000
        )
    path.write_text(text, encoding="utf-8", errors="ignore")
    try:
        with time_limit(LIMIT_S):
            cluster = gp.make_cluster(path)
            assert 0 < len(cluster) <= MAX_DEVICES
            dump_toml(cluster)
        return "fine"
    except gp.GraphpartError as error:
        return type(error).__name__


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value) if value is not None else '""'


@pytest.mark.parametrize("block", range(10))
def test_damaged_plans_end_in_named_errors(block: int, tmp_path: Path) -> None:
    found = Counter(try_plan(number, tmp_path) for number in range(12 * block, 12 * block + 12))
    assert sum(found.values()) == 12 and found["fine"] < 12


@pytest.mark.parametrize("block", range(4))
def test_damaged_clusters_end_in_named_errors(block: int, tmp_path: Path) -> None:
    assert sum(Counter(try_cluster(number, tmp_path) for number in range(12 * block, 12 * block + 12)).values()) == 12


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_good_plans_pass_the_border(path: Path, tmp_path: Path) -> None:
    copied = tmp_path / "plan.json"
    copied.write_text(path.read_text())
    use(copied)


def _changed(*place: Any, to: Any, plan: int = 0) -> dict[str, Any]:
    data = json.loads(PLANS[plan].read_text())
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = to
    return data


def _with_batch(batch: int, num_microbatches: int) -> dict[str, Any]:
    """A short file of a plan with a batch of any size."""
    number = next(i for i, path in enumerate(PLANS) if path.stem == "plan_layer")
    text = PLANS[number].read_text()
    data = json.loads(re.sub(r"\b4,6\b", f"{batch},6", re.sub(r"\b4,6,", f"{batch},6,", text)))
    for rule in data["graph"]["rules"]:
        rule["extents"] = {axis: batch if extent == 4 else extent for axis, extent in rule["extents"].items()}
    data["choices"]["num_microbatches"] = num_microbatches
    return data


@pytest.mark.parametrize("num_microbatches", [1, 4, 8_000_000_000])
def test_a_huge_batch_costs_neither_time_nor_memory(num_microbatches: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(_with_batch(8_000_000_000, num_microbatches)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with time_limit(LIMIT_S), suppress(PlanError, OutOfMemoryError, PlacementError):  # what it would fill is told
        use(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MORE_BYTES


@pytest.mark.parametrize(
    "spec",
    ["1000000xH100", "9" * 5000 + "xH100", "4000xH100+4000xA100", 10**9, ["cpu:0"] * 9999],
    ids=["preset", "digits", "sum", "count", "names"],
)
def test_too_many_devices_are_refused_at_once(spec: Any) -> None:
    with time_limit(LIMIT_S), pytest.raises(ClusterError, match=f"{MAX_DEVICES}"):
        gp.make_cluster(spec)


def test_many_devices_are_made_in_bounded_time() -> None:
    with time_limit(LIMIT_S):
        cluster = gp.make_cluster("1024xH100")
    assert cluster.link(0, 7) != cluster.link(0, 8) == cluster.default_link
    assert not cluster.links and len(cluster.switches) == 129


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (float("nan"), "holds nan"),
        ([{"a": float("inf")}], r"\[0\].a holds inf"),
        ({"a": {"b": 10**30}}, "a.b holds a number of many digits"),
        (deep(100), "nested more than"),
        ({"x" * (MAX_TEXT + 1): 1}, "characters"),
        ({"a": "\ud800"}, "not Unicode"),
    ],
    ids=["nan", "inf", "digits", "depth", "key", "surrogate"],
)
def test_plain_data_is_bounded(data: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        check_plain(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ('{"format": "graphpart-plan", "version": ' + "9" * 5000 + "}", "not a JSON file"),
        ("", "not a JSON file"),
        ("[]", "not a plan"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        gp.Plan.load(path)


@pytest.mark.parametrize("command", [["explain"], ["simulate"], ["draw"]], ids=lambda command: command[0])
def test_the_command_line_tells_it_in_one_line(command: list[str], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(_changed("graph", "operators", 0, "name", to=CONTROL)))
    picture = [str(tmp_path / "plan.dot")] if command == ["draw"] else []
    assert main([*command, str(path), *picture]) == 1
    error = capsys.readouterr().err
    assert error.startswith("graphpart: ") and error.count("\n") == 1 and "\x1b" not in error


def _hostile(text: str, number: int) -> dict[str, Any]:
    """A good plan, but for every text that people read: names, modules, notes, lines, devices."""
    data: dict[str, Any] = json.loads(PLANS[number].read_text())
    for place, op in enumerate(data["graph"]["operators"]):
        op["module_path"] = f"{text}.{place}"
        op["note"] = op["call_path"] = op["recompute"] = text
    data["graph"]["name"] = data["strategy"] = text
    data["graph"]["lines"] = [[text, 1, text] for _ in data["graph"].get("lines", [])]
    data["notes"] = [text]
    data["candidates"] = [{"strategy": text, "step_s": 1.0, "reason": text}]
    for device in data["cluster"]["device"]:
        device["kind"] = text
        device["name"] = f"{device['name']}{text}"
    for link in data["cluster"].get("links", []):
        for key in ("source", "destination"):
            link[key] = f"{link[key]}{text}"
    for switch in data["cluster"].get("switch", []):
        switch["name"] = f"{switch['name']}{text}"
        switch["members"] = [f"{member}{text}" for member in switch["members"]]
    for source in data["graph"]["sources"]:
        source["names"] = [text]
    names = [op["name"] for op in data["graph"]["operators"] if not op["name"].startswith("args")]
    return dict(json.loads(_renamed(json.dumps(data), names, text)))


def _renamed(text: str, names: list[str], hostile: str) -> str:
    for number, name in enumerate(names):
        text = text.replace(json.dumps(name), json.dumps(f"{hostile}{number}"))
    return text


@pytest.mark.parametrize("text", [HOSTILE, CONTROL, "</title><script>alert(1)</script>", "\\N\\G\\l\"'&lt;"])
@pytest.mark.parametrize("number", range(0, len(PLANS), 2))
def test_no_markup_of_a_plan_reaches_what_is_drawn(text: str, number: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(_hostile(text, number)))
    plan = gp.Plan.load(path)
    shown = [plan.explain(), str(gp.simulate(plan))]
    timeline = gp.simulate(plan)
    svg = timeline.draw(tmp_path / "step.svg", title=text).read_text()
    trace = timeline.save_trace(tmp_path / "trace.json").read_text()
    for bridges in (False, True):
        source = plan.dot(bridges=bridges, title=text)
        # What dot takes for markup or for attributes is outside of quoted texts, and inside of no plan's.
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', source)
        assert not re.search(r'(?i)\b(url|href|image|src)=""|<script', outside)
        assert all(
            re.fullmatch(r"/?[A-Z]+( [A-Z-]+=\"\")*/?", tag) for tag in re.findall(r"<([^<>]+)>", outside) if tag
        )
        shown.append(source)
    assert "<script" not in svg and "javascript:alert" not in re.sub(r">[^<]*<", "><", svg)
    json.loads(trace)
    assert not any(control in found for found in (*shown, svg) for control in ("\x1b", "\x07", "\x00"))


@pytest.mark.slow
@pytest.mark.parametrize("bridges", [False, True])
def test_graphviz_plants_no_link(bridges: bool, tmp_path: Path) -> None:
    pytest.importorskip("graphviz")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(_hostile(HOSTILE, 0)))
    try:
        svg = gp.Plan.load(path).draw(tmp_path / "plan.svg", bridges=bridges).read_text()
    except gp.DrawError:
        pytest.skip("Graphviz is not installed")
    assert "xlink:href" not in svg and "<image" not in svg and "<script" not in svg


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tries damaged files of plans and clusters.")
    parser.add_argument("--examples", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for each in range(options.seed, options.seed + options.examples):
            for attempt in (try_plan, try_cluster):
                try:
                    totals[f"{attempt.__name__}: {attempt(each, Path(folder))}"] += 1
                except Exception as error:
                    totals[f"{attempt.__name__}: FOREIGN {type(error).__name__}"] += 1
                    print(f"{attempt.__name__} {each}: {type(error).__name__}: {error}"[:300])
    print(*(f"{count:6d} {name}" for name, count in totals.most_common()), sep="\n")
    sys.exit(any("FOREIGN" in name for name in totals))
