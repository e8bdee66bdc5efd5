"""What a user decides is one value: each field is a keyword, an option of the command line, a key of a plan's file."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import graphpart as gp
from graphpart.cli.arguments import CHOICE_OPTIONS, build_parser, choices_of
from graphpart.ir.placement import Placement
from graphpart.planning.choices import ChoiceKeywords
from graphpart.strategies import OPTIONS, STRATEGIES

ROOT = Path(__file__).parent.parent
NAMES = [field.name for field in fields(gp.Choices)]

OTHERS: dict[str, tuple[str, Any]] = {
    "strategy": ("--strategy layer", "layer"),
    "strategy_options": ("--strategy-option chunks=2 --strategy-option use_all_devices=false", None),
    "num_microbatches": ("--microbatches 3", 3),
    "schedule": ("--schedule 1f1b", "1f1b"),
    "batch_norm": ("--batch-norm microbatch", "microbatch"),
    "sample_dims": ("--sample-dims args[0]=0 --sample-dims mask=none", {"args[0]": 0, "mask": None}),
    "wire_dtype": ("--wire-dtype bfloat16", "bfloat16"),
    "memory_reserve": ("--memory-reserve 0.25", 0.25),
    "optimizer_bytes_per_element": ("--optimizer-bytes 6", 6.0),
    "recompute": ("--recompute 0,2", ("0", "2")),
    "offload": ("--offload", True),
    "deadline_s": ("--deadline 7.5", 7.5),
}
"""Per field, how the command line chooses another value than the default, and that value."""
OTHERS["strategy_options"] = (OTHERS["strategy_options"][0], {"chunks": 2, "use_all_devices": False})


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def parsed(text: str, command: str = "plan", *more: str) -> gp.Choices:
    parser = build_parser(dict.fromkeys(("plan", "explain", "draw", "simulate", "run"), lambda options: 0))
    return gp.Choices(**choices_of(parser.parse_args([command, "gpt2", "--devices", "2", *text.split(), *more])))


def test_every_choice_is_listed_here() -> None:
    assert list(OTHERS) == sorted(OTHERS, key=NAMES.index) or set(OTHERS) == set(NAMES)


@pytest.mark.parametrize("function", [gp.partition, gp.plan])
def test_every_choice_is_a_keyword_with_its_default(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    for field in fields(gp.Choices):
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[field.name].default == field.default


def test_type_checkers_know_the_keywords() -> None:
    assert get_type_hints(ChoiceKeywords) == get_type_hints(gp.Choices)


def test_an_unknown_keyword_is_an_error() -> None:
    plan = gp.plan(net(), 2, (torch.randn(6, 4),), strategy="single")
    for make, given in ((gp.partition, {}), (gp.plan, {}), (gp.partition, {"plan": plan})):
        with pytest.raises(TypeError, match="unexpected keyword argument 'num_microbatch'"):
            make(net(), 2, num_microbatch=2, **given)


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("name", NAMES)
def test_every_choice_is_an_option_of_the_command_line(name: str, command: str) -> None:
    text, value = OTHERS[name]
    assert text.startswith(CHOICE_OPTIONS[name][0])
    named = "--strategy layer" if name == "strategy_options" else ""
    chosen = parsed(f"{text} {named}", command)
    assert getattr(chosen, name) == value != getattr(gp.Choices(), name)
    others = {n: v for n, v in vars(gp.Choices()).items() if n != name and not (named and n == "strategy")}
    assert {n: getattr(chosen, n) for n in others} == others
    assert parsed("", command) == gp.Choices()


def test_the_command_line_places_by_hand_and_counts_by_the_optimizer() -> None:
    assert parsed("--strategy 0=1,*=cpu:0").strategy == {"0": 1, "*": "cpu:0"}
    assert parsed("--optimizer momentum").optimizer_bytes_per_element == 4
    assert parsed("--optimizer momentum --optimizer-bytes 12").optimizer_bytes_per_element == 12


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_is_kept_in_the_file_of_a_plan(name: str, tmp_path: Path) -> None:
    value = OTHERS[name][1]
    plan = gp.plan(net(), 2, (torch.randn(6, 4),), strategy="layer")
    changed = replace(plan, choices=replace(plan.choices, **{name: value}))
    data = json.loads(changed.save(tmp_path / "plan.json").read_text())
    assert set(data["choices"]) == set(NAMES)
    assert data["choices"][name] == (list(value) if isinstance(value, tuple) else value)
    loaded = gp.Plan.load(tmp_path / "plan.json")
    assert loaded == changed and getattr(loaded.choices, name) == value


def alternating(graph: gp.Graph, cluster: gp.Cluster, **options: Any) -> Placement:
    devices = {op.name: i % len(cluster) for i, op in enumerate(graph.operators)}
    return Placement.whole(graph, devices)


@pytest.mark.parametrize("strategy", [alternating, {"0": 0, "*": 1}, [gp.pin("*", 1)]])
def test_a_strategy_without_a_name_is_kept_as_its_placement(strategy: Any, tmp_path: Path) -> None:
    plan = gp.plan(net(), 2, (torch.randn(6, 4),), strategy=strategy)
    assert plan.strategy == ("alternating" if callable(strategy) else "by hand")
    loaded = gp.Plan.load(plan.save(tmp_path / "plan.json"))
    assert loaded == plan and loaded.choices.strategy == plan.placement
    again = gp.plan(net(), 2, (torch.randn(6, 4),), strategy=loaded.choices.strategy)
    assert again.placement == plan.placement


def test_every_choice_is_a_word_of_the_documentation() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    assert set(NAMES) <= words


def test_options_of_strategies_are_those_of_their_functions() -> None:
    for name, strategy in STRATEGIES.items():
        kinds = inspect.signature(strategy).parameters.values()
        assert tuple(OPTIONS.get(name, {})) == tuple(p.name for p in kinds if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("option", ["num_microbatches", "memory_reserve", "optimizer_bytes_per_element", "holding"])
def test_a_strategys_options_are_its_own(option: str) -> None:
    with pytest.raises(gp.ArgumentError, match=option):
        gp.plan(net(), 2, (torch.randn(6, 4),), strategy="layer", strategy_options={option: 0.5})


@pytest.mark.parametrize(
    ("strategy", "option", "value"),
    [("layer", "chunks", v) for v in (0, -1, "2", 1.5, True, None)]
    + [("batch", "shard_parameters", v) for v in ("no", 1, None)],
)
def test_an_option_has_a_value_that_it_can_have(strategy: str, option: str, value: Any) -> None:
    with pytest.raises(gp.ArgumentError, match=rf"{option}.*; give "):
        gp.Choices(strategy=strategy, strategy_options={option: value})


def test_an_own_strategy_is_told_its_terms_and_options_alone() -> None:
    told: dict[str, Any] = {}

    def own(graph: gp.Graph, cluster: gp.Cluster, **options: Any) -> Placement:
        told.update(options)
        return alternating(graph, cluster)

    choices = {"num_microbatches": 2, "schedule": "1f1b", "memory_reserve": 0.1}
    gp.plan(net(), 2, (torch.randn(6, 4),), strategy=own, strategy_options={"colour": "red"}, **choices)
    terms = {"num_microbatches": 2, "memory_reserve": 0.1, "optimizer_bytes_per_element": 8}
    assert told == {**terms, "colour": "red"}


@pytest.mark.parametrize(
    ("name", "made_by", "schedule"),
    [("plan_version_1", "single", "1f1b"), ("plan_version_1_by_hand", "by hand", gp.Async(in_flight=2))],
)
def test_a_file_of_the_first_version_loads(name: str, made_by: str, schedule: Any, tmp_path: Path) -> None:
    plan = gp.Plan.load(ROOT / "tests" / "data" / f"{name}.json")
    assert (plan.strategy, plan.choices.schedule) == (made_by, schedule)
    assert plan.choices.strategy == (made_by if made_by in STRATEGIES else plan.placement)
    if made_by == "single":
        kept = plan.choices
        assert (kept.num_microbatches, kept.wire_dtype, kept.recompute) == (3, "bfloat16", ("2",))
        assert (kept.memory_reserve, kept.optimizer_bytes_per_element, kept.deadline_s) == (0.1, 4, 600)
    assert gp.Plan.load(plan.save(tmp_path / "again.json")) == plan
    assert plan.explain() and gp.simulate(plan).makespan_s > 0
