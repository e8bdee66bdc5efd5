"""Degrees that a user says: read, refused, planned, and the same numbers as one device."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import graphpart as gp
from graphpart.cli.main import main
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.planning.choices import Choices
from graphpart.planning.make import make_plan
from graphpart.strategies.cuts.inverse_rules import Cut
from graphpart.strategies.cuts.mesh_cuts import product
from graphpart.trace import trace
from tests.helpers import zoo
from tests.helpers.meshes import random_cut
from tests.oracle import check_safely, random_cases

torch.set_num_threads(1)

MESHES = {
    "dp2 tp2": 4,
    "dp2 pp2": 4,
    "tp2 pp2": 4,
    "dp2 tp2 pp2": 8,
    "tp2 sp": 2,
    "dp2 zero1": 2,
    "cp2": 2,
    "cp4": 4,
    "tp2 cp2": 4,
}
IMAGES = ("vit", "resnet")
"""Models without positions to cut for ``sp``."""
CASES = [
    *[("gpt2", degrees) for degrees in MESHES],
    *[
        ("t5", "tp2 sp"),
        ("llama", "dp2 zero1"),
        ("llama", "cp4"),
        ("bert", "cp2"),
        ("t5", "tp2 cp2"),
        ("vit", "cp2"),
        ("unet", "tp2 cp2"),
    ],
    *[(name, list(MESHES)[i % 4]) for i, name in enumerate(zoo.MODELS) if name != "gpt2"],
]


def traced(name: str, batch: int = 4) -> Graph:
    sample = zoo.MODELS[name](batch)
    return trace(sample.model, sample.args, sample.kwargs).graph


# --- what is said -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["dp4 tp8 pp2", "tp8 pp2 dp4", "dp=4, tp=8, pp=2", "DP4 TP8 PP2"])
def test_degrees_are_read_in_any_order(text: str) -> None:
    assert gp.Degrees.read(text) == gp.degrees(dp=4, tp=8, pp=2)
    assert gp.Choices(strategy=text).strategy == "dp4 tp8 pp2" == str(gp.degrees(dp=4, tp=8, pp=2))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("dp4 tq8", "there is no degree 'tq8'; did you mean 'tp8'"),
        ("dp4 tp", "'tp' in 'dp4 tp' says no number; write tp2"),
        ("dp2 dp4", "says dp twice"),
        ("dp0 tp2", "dp=0; give a whole number from 1"),
        ("tp-2", "tp=-2; give a whole number"),
        ("tp2 vp2", "vp2 gives each stage 2 intervals of layers, which takes pp2"),
        ("tp2 sp2", "'sp2' in 'tp2 sp2' says a number; write sp"),
        ("dp2 sp", "sp cuts positions among the devices that share features, which takes tp2"),
        ("tp2 zero1", "zero1 cuts parameters over their replicas, which takes dp2"),
        ("dp2 zero3", "zero3 is not supported yet"),
        ("dp2 ep2", "expert parallelism is not supported yet"),
    ],
)
def test_what_is_no_degree_is_refused(text: str, answer: str) -> None:
    with pytest.raises(gp.ArgumentError, match=answer):
        gp.Choices(strategy=text)


def test_a_name_with_a_number_is_no_degree() -> None:
    with pytest.raises(gp.ArgumentError, match=r"there is no strategy .layer2.; give .*degrees such as"):
        gp.Choices(strategy="layer2")


@pytest.mark.parametrize("given", [{"tq": 2}, {"tp": 2.0}, {"pp": True}, {"cp": 0}])
def test_degrees_by_keyword_are_checked(given: dict[str, int]) -> None:
    with pytest.raises(gp.ArgumentError, match=next(iter(given))):
        gp.degrees(**given)


@pytest.mark.parametrize(
    ("text", "num_devices", "nearest"),
    [
        ("dp4 tp8 pp2", 32, "dp2 tp8 pp2"),
        ("dp4 tp8 pp2", 48, "dp3 tp8 pp2"),
        ("tp3", 2, "tp2"),
        ("pp4 vp2", 8, "dp2 pp4 vp2"),
        ("dp2 tp2 sp zero1", 2, "tp2 sp"),
        ("dp2 tp2", 1, "dp1"),
        ("dp4 tp2 cp2", 8, "dp2 tp2 cp2"),
    ],
)
def test_another_number_of_devices_is_answered_with_the_nearest(text: str, num_devices: int, nearest: str) -> None:
    with pytest.raises(gp.ArgumentError, match=f"nearest that is for {num_devices}: {nearest!r}"):
        gp.partition(torch.nn.Linear(2, 2), num_devices, strategy=text)
    assert gp.Degrees.read(nearest).num_devices == num_devices


@pytest.mark.parametrize(
    ("num_devices", "text"),
    [
        (32, "dp32"),
        (64, "dp32 tp2"),
        (128, "dp32 tp4"),
        (256, "dp32 tp8"),
        (512, "dp32 tp8 pp2"),
        (1024, "dp32 tp8 pp4 vp3"),
        (1536, "dp24 tp8 pp8 vp2"),
        (1920, "dp15 tp8 pp16 vp2"),
        (2520, "dp9 tp8 pp35 vp3"),
        (3072, "dp6 tp8 pp64"),
    ],
)
def test_the_rows_of_a_published_table_can_be_said(num_devices: int, text: str) -> None:
    """Narayanan et al., SC 2021, Table 1."""
    said = gp.Degrees.read(text)
    said.check(num_devices)
    stages = said.stages()
    assert str(said) == text and stages.ravel().tolist() == list(range(num_devices))
    # What shares features lies within a node of eight.
    assert all(len({device // 8 for device in row}) == 1 for row in stages.reshape(-1, said.tp).tolist())


def test_the_nearest_is_never_beaten() -> None:
    rng = random.Random(3)
    for _ in range(50):
        said = gp.degrees(dp=rng.randint(1, 8), tp=rng.randint(1, 8), pp=rng.randint(1, 8))
        number = rng.randint(1, 64)

        def apart(dp: int, tp: int, pp: int, said: gp.Degrees = said) -> float:
            return sum(abs(math.log2(a / b)) for a, b in zip((dp, tp, pp), (said.dp, said.tp, said.pp), strict=True))

        near = said.nearest(number)
        every = itertools.product(range(1, number + 1), repeat=2)
        best = min(apart(number // t // p, t, p) for t, p in every if number % (t * p) == 0)
        assert near.num_devices == number and apart(near.dp, near.tp, near.pp) == pytest.approx(best)


def test_plan_files_and_the_command_line_keep_degrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), torch.randn(4, 4)
    plan = gp.plan(model, 4, (x,), strategy=gp.degrees(dp=2, tp=2))
    assert plan.strategy == plan.choices.strategy == "dp2 tp2"
    assert gp.Plan.load(plan.save(tmp_path / "plan.json")) == plan
    path = tmp_path / "cli.json"
    arguments = ["plan", "gpt2-tiny", "--devices", "4", "--batch", "2x8"]
    assert main([*arguments, "--degrees", "dp2 tp2", "--out", str(path)]) == 0
    assert gp.Plan.load(path).choices.strategy == "dp2 tp2"
    assert main([*arguments, "--strategy", "dp2 tp4"]) != 0
    assert "nearest that is for 4" in capsys.readouterr().err


# --- where devices are --------------------------------------------------------------------------------------------


def cut_along(placement: Placement, name: str) -> dict[int, dict[str, str]]:
    return {tile.device: {axis: str(part) for axis, part in tile.axes.items()} for tile in placement.tiles[name]}


def test_neighbours_share_features_then_come_replicas_then_stages() -> None:
    graph = traced("gpt2")
    plan = make_plan(graph, gp.make_cluster(8), Choices(strategy="dp2 tp2 pp2"))
    plan.placement.check(graph, 8)
    products = [op.name for op in graph.operators if "addmm" in op.target]
    first, last = cut_along(plan.placement, products[1]), cut_along(plan.placement, products[-1])
    assert list(first) == [0, 1, 2, 3] and list(last) == [4, 5, 6, 7]
    samples = [first[device]["m"] for device in range(4)]
    features = [first[device]["k"] for device in range(4)]
    assert samples[0] == samples[1] != samples[2] == samples[3]
    assert features[0] == features[2] != features[1] == features[3]


def test_tables_and_pictures_speak_of_stages() -> None:
    plan = make_plan(traced("gpt2"), gp.make_cluster(8), Choices(strategy="dp2 tp2 pp2"))
    text, picture = plan.explain(), plan.dot()
    assert "Degrees dp2 tp2 pp2: 2 stages (pp), 2 replicas (dp), 2 parts of features (tp)" in text
    assert "stage 0 → stage 1" in text and "cpu:4" not in text.replace("fullest device cpu:4", "")
    assert "stage 1" in picture and "cpu:4–7" in picture


def test_virtual_stages_come_round() -> None:
    graph = traced("gpt2")
    plan = make_plan(graph, gp.make_cluster(2), Choices(strategy="pp2 vp2", num_microbatches=2, schedule="interleaved"))
    where = [plan.placement.device(op.name) for op in graph.operators if op.name not in graph.unsourced]
    assert [device for device, _ in itertools.groupby(where)] == [0, 1, 0, 1]


def test_gradients_of_replicas_are_never_summed_by_one_home() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    graph = trace(model, (torch.randn(8, 64),)).graph
    for degrees, num_devices in (("dp4", 4), ("dp2 tp2", 4)):
        for cluster in (gp.make_cluster(num_devices), gp.make_cluster(f"{num_devices}xH100")):
            plan = make_plan(graph, cluster, Choices(strategy=degrees))
            kept = [0] * num_devices
            for source in graph.parameters:
                for shard in plan.placement.home(source.value):
                    kept[shard.device] += shard.region.num_elements
            assert max(kept) < 1.6 * sum(kept) / num_devices


def traffic(degrees: str, **choices: Any) -> dict[str, int]:
    """Bytes that a step of two blocks of GPT-2 sends, counted as it runs, by kind of collective of activations."""
    sample = zoo.MODELS["gpt2"](4)
    parted = gp.partition(sample.model.eval(), 2, strategy=degrees, **choices)
    parted(*sample.args, **sample.kwargs)["loss"].backward()
    report, found = parted.last_step, Counter[str]()
    assert report is not None
    blocks = {v.name for op in parted.plan.graph.operators if ".h." in op.module_path for v in op.results}
    for collective in report.collectives:
        if collective.value in blocks:
            found[collective.kind] += collective.size_bytes
    return dict(found)


def test_sequence_parallel_sends_the_bytes_of_the_sums_that_it_stands_for() -> None:
    sums, parts = traffic("tp2"), traffic("tp2 sp")
    assert set(sums) == {"all-reduce"}
    assert parts["reduce-scatter"] == parts["all-gather"] == sums["all-reduce"] / 2 and "all-reduce" not in parts


def test_context_parallelism_gathers_keys_and_values_alone() -> None:
    assert set(traffic("cp2")) <= {"all-gather", "reduce-scatter"}
    blocks = make_plan(traced("gpt2"), gp.make_cluster("2xH100"), Choices(strategy="cp2")).placement
    parts = [len(tile.axes["l"]) for tile in blocks.tiles["scaled_dot_product_attention"]]
    assert sum(parts) == 6 and max(parts) <= 4


# --- the same numbers ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "degrees"), CASES)
def test_models_under_degrees_equal_one_device(name: str, degrees: str) -> None:
    sample = zoo.MODELS[name](8)
    parted = gp.partition(copy.deepcopy(sample.model), MESHES[degrees], strategy=degrees, num_microbatches=2)
    parted.verify(*sample.args, **sample.kwargs).check(5e-2 if name == "mixed_dtypes" else 1e-4)  # bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_what_has_no_sequence_refuses_sequence_parallelism(name: str) -> None:
    with pytest.raises(gp.GraphpartError, match=r"cut along positions.*leave out sp"):
        make_plan(traced(name), gp.make_cluster(2), Choices(strategy="tp2 sp"))


def test_what_has_no_positions_refuses_context_parallelism() -> None:
    graph = trace(torch.nn.Linear(4, 4), (torch.randn(4),), sample_dims={"args[0]": None}).graph
    with pytest.raises(gp.GraphpartError, match=r"cut along positions into 2 parts.*leave out cp"):
        make_plan(graph, gp.make_cluster(2), Choices(strategy="cp2"))


@pytest.mark.whole
@pytest.mark.sampled(50)
@pytest.mark.parametrize("number", range(50))
def test_random_meshes(number: int, first_seed: int) -> None:
    cases = random_cases(first_seed + number, 3, meshes=True)
    wrong = {str(case): found for case in cases if (found := check_safely(case))}
    assert not wrong, "\n".join(f"{case}\n  " + "\n  ".join(found) for case, found in wrong.items())


def test_a_product_of_cuts_is_a_cut() -> None:
    graph, rng = traced("gpt2"), random.Random(1)
    for op in graph.operators:
        cut: Cut = ((),)
        for length in (2, 3):
            cut = product(cut, random_cut(op, length, rng))
        tiles = tuple(gp.Tile(i, dict(axes)) for i, axes in enumerate(cut) if axes is not None)
        Placement({**dict.fromkeys(graph.operator, (gp.Tile(0),)), op.name: tiles}).check(graph, 6)
