"""The gallery is what its code draws, and what it draws is what the plans' programs do."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers")

VIZ = Path(__file__).parent.parent / "viz"
sys.path.insert(0, str(VIZ))

import gallery  # noqa: E402
import neurons  # noqa: E402
import unrolled  # noqa: E402
from figures import FIGURES, Figure  # noqa: E402

pytestmark = pytest.mark.sampled(8)

MOST_BYTES = 300_000
BY_NAME = {figure.name: figure for figure in FIGURES}


@pytest.fixture(params=[pytest.param(f, id=f.name, marks=pytest.mark.xdist_group(f.name)) for f in FIGURES])
def figure(request: pytest.FixtureRequest) -> Figure:
    return request.param


def test_pictures_are_what_the_code_draws(figure: Figure) -> None:
    path = VIZ / "dot" / f"{figure.name}.dot" if figure.is_dot else VIZ / f"{figure.name}.svg"
    assert path.read_text(encoding="utf-8") == gallery.source(figure), f"{path.name} is out of date: make viz"


def test_pictures_show_every_node_of_their_source(figure: Figure) -> None:
    svg = (VIZ / f"{figure.name}.svg").read_text(encoding="utf-8")
    assert len(svg.encode()) < MOST_BYTES
    if figure.is_dot:
        named = set(re.findall(r"^(\w+) \[", gallery.source(figure), re.MULTILINE)) - {"graph", "node", "edge"}
        shown = re.findall(r'class="node">\s*<title>(\w+)</title>', svg)
        assert sorted(shown) == sorted(named)


def test_the_readme_shows_every_picture() -> None:
    text = (VIZ / "README.md").read_text(encoding="utf-8")
    assert text == gallery.readme(), "viz/README.md is out of date: make viz"
    assert {f"{figure.name}.svg" for figure in FIGURES} == set(re.findall(r"\]\((\w+\.svg)\)", text))


@pytest.mark.parametrize("name", ["layer", "feature", "hybrid", "local", "anywhere"])
def test_drawn_edges_are_the_programs_messages(name: str) -> None:
    plan = gallery.plan_of(BY_NAME[name])
    found = neurons.wires(plan)  # checks each edge that changes device against the program
    sent = sum(wire.is_sent for wire in found)
    assert sent > 0
    svg = neurons.draw(plan, name)
    assert svg.count('class="sent"') == sent and svg.count('class="near"') == len(found) - sent


def test_only_boundaries_cross_in_a_local_network() -> None:
    found = neurons.wires(gallery.plan_of(BY_NAME["local"]))
    between_halves = [w for w in found if w.is_sent and {w.source, w.destination} == {5, 6}]
    assert Counter(w.column for w in between_halves) == {2: 2, 3: 2, 4: 2, 5: 2}
    assert {w.column for w in found if w.is_sent} - {w.column for w in between_halves} == set()
    assert sum(w.is_sent and w.column == 4 for w in found) == 34  # the whole layer moves on: every edge but none inside


def test_groups_of_neurons_are_found_and_drawn() -> None:
    svg = gallery.source(BY_NAME["free"])  # each edge that changes device is checked against the program
    plan = gallery.plan_of(BY_NAME["free"])
    assert 0 < svg.count('class="sent"') <= 9 < svg.count('class="near"')
    assert all(tile.reads for name in ("linear_1", "linear_2", "linear_3") for tile in plan.placement.tiles[name])
    assert "reads k " in plan.dot(bridges=False)


def test_a_value_crosses_once_however_many_read_it() -> None:
    plan = gallery.plan_of(BY_NAME["hybrid"])
    found = [w for w in neurons.wires(plan) if w.is_sent and w.column == 3]
    elements = sum(
        plan.program.wire[b.wire].region.num_elements
        for b in plan.program.bridges
        if plan.program.wire[b.wire].value == neurons.columns(plan)[2].values[-1]
    )
    assert len(found) == 8 * 8 and elements == 8 * 2


def test_waves_run_across_layers_and_time() -> None:
    cells = unrolled.cells(gallery.plan_of(BY_NAME["lstm"]))
    assert {key: cell.wave for key, cell in cells.items() if key[0] == "lstm.1"} == {
        ("lstm.1", time): time + 3 for time in range(5)
    }
    assert cells["lstm.0", 1].wave == cells["lstm.1", 0].wave
    assert cells["lstm.1", 2].reads == (("lstm.0", 2), ("lstm.1", 1))


def test_before_and_after_differ_by_send_and_recv() -> None:
    before, after = (gallery.source(BY_NAME[name]) for name in ("fork_before", "fork"))
    assert "send #" not in before and after.count('label="send #0"') == after.count('label="recv #0"') == 1
    nodes = [len(re.findall(r"^n\d+ \[", source, re.MULTILINE)) for source in (before, after)]
    assert nodes[1] == nodes[0] + 2


def test_megatrons_pairs_are_seen() -> None:
    assert gallery.source(BY_NAME["column_row"]).count("<B>all-reduce</B>") == 1
    source = gallery.source(BY_NAME["gpt2_feature"])
    assert source.count("⇄ all-reduce") == 4 and source.count("n 0:1536<BR/>Σk 0:1536") == 2
