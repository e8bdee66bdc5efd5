"""What the face refuses: odd values of arguments, and choices that a given plan has made already."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphpart as gp
from graphpart.errors import ArgumentError

X = torch.randn(6, 4)
NAN, INF = float("nan"), float("inf")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


# --- beside a plan ------------------------------------------------------------------------------------------------

CHOICES: dict[str, Any] = {
    "strategy": "layer",
    "strategy_options": {"chunks": 2},
    "num_microbatches": 2,
    "schedule": "1f1b",
    "batch_norm": "microbatch",
    "sample_dims": {"args[0]": None},
    "wire_dtype": "bfloat16",
    "memory_reserve": 0.1,
    "optimizer_bytes_per_element": 0,
    "recompute": "none",
    "offload": True,
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_beside_a_plan_is_refused_by_name(name: str, tmp_path: Path) -> None:
    plan = gp.plan(net(), 2, (X,), strategy="single")
    for given in (plan, plan.save(tmp_path / "plan.json")):
        message = rf"{name} cannot be combined with plan=, which fixes it; drop it.*plan\(.*{name}="
        with pytest.raises(ArgumentError, match=message):
            gp.partition(net(), plan=given, **{name: CHOICES[name]})
    with pytest.raises(ArgumentError, match=r"num_microbatches, wire_dtype cannot be combined.* fixes them; drop them"):
        gp.partition(net(), plan=plan, num_microbatches=2, wire_dtype="float16")


def test_every_argument_counts_beside_a_plan_or_is_refused() -> None:
    """A new argument of ``partition`` has to be one or the other."""
    count = {"model", "devices", "plan", "executor", "deadline_s", "check_weights"}
    assert set(inspect.signature(gp.partition).parameters) - count == set(CHOICES)


def test_a_deadline_beside_a_plan_is_the_one_that_counts() -> None:
    plan = gp.plan(net(), 2, (X,), strategy="layer")
    for given, expected in ((None, plan.deadline_s), (7.0, 7.0)):
        parted = gp.partition(net(), plan=plan, deadline_s=given)
        parted(X)
        assert parted.plan.program.deadline_s == expected


# --- the dimension of samples -------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Scales by a table that has as many rows as the batch has samples, but none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        y = self.layer(x)
        return y if table is None else y @ table


@pytest.mark.slow
@pytest.mark.parametrize("name", ["args[1]", "table"])
@pytest.mark.parametrize("by_position", [True, False])
def test_a_dimension_of_samples_is_kept_by_the_plan_and_for_every_way_to_call(name: str, by_position: bool) -> None:
    model, table = Scaled(), torch.randn(6, 6)
    args, kwargs = ((X, table), {}) if by_position else ((X,), {"table": table})
    expected = model(*args, **kwargs)
    options = {"num_microbatches": 3, "strategy": "layer", "sample_dims": {name: None}}
    plan = gp.plan(model, 2, args, kwargs, **options)
    assert plan.graph.sample_dims == {"x": 0}
    for parted in (gp.partition(model, plan=plan), gp.partition(model, 2, **options)):
        torch.testing.assert_close(parted(*args, **kwargs), expected)
        assert parted.plan.graph.sample_dims == {"x": 0}
        torch.testing.assert_close(parted(X), model(X))  # a call without the table
        torch.testing.assert_close(parted(X, table=table), expected)


def test_a_dimension_of_samples_of_no_input_is_refused() -> None:
    for name in ("tabel", "args[2]"):
        with pytest.raises(
            ArgumentError, match=re.escape(f"sample_dims names {name!r}; the tensor inputs are 'args[0]'")
        ):
            gp.partition(Scaled(), 2, sample_dims={name: 0})(X)
    with pytest.raises(
        ArgumentError, match=r"sample_dims gives 'args\[0\]' dimension 2, but it is \[6, 4\]; .* 0 to 1"
    ):
        gp.plan(Scaled(), 2, (X,), sample_dims={"args[0]": 2})


# --- odd values ---------------------------------------------------------------------------------------------------

ODD: dict[str, list[Any]] = {
    "num_microbatches": [True, 0, -1, "2", 2.0, None],
    "schedule": [3, [1], {}, "1F1B"],
    "batch_norm": [3, None, [1], "Barrier"],
    "sample_dims": [3, [0], "args[0]", {3: 0}, {"args[0]": "a"}, {"args[0]": -1}, {"args[0]": True}],
    "wire_dtype": [3, [1], torch.bfloat16],
    "memory_reserve": ["a", 1, -0.5, NAN, None, True],
    "optimizer_bytes_per_element": ["a", -1, NAN, INF, None, True],
    "recompute": [3, None, [3], {}, True],
    "offload": [3, "a", None],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ODD.items() for v in values])
def test_an_odd_value_is_refused_by_name_before_anything_is_traced(name: str, value: Any) -> None:
    pattern = "no schedule" if name == "schedule" else rf"{name}.* (give|it has to be) "
    for make in (lambda **k: gp.plan(net(), 2, **k), lambda **k: gp.partition(net(), 2, **k)):
        with pytest.raises(gp.ArgumentError, match=pattern) as error:
            make(**{name: value})
        odd = value if not isinstance(value, dict) else next(iter(value if 3 in value else value.values()), value)
        assert repr(odd) in str(error.value)


def test_every_choice_has_its_odd_values() -> None:
    assert set(ODD) == set(CHOICES) - {"strategy", "strategy_options"}


@pytest.mark.parametrize("value", ["a", -1, 0, NAN, INF, True])
def test_an_odd_deadline_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"deadline_s=.* above 0"):
        gp.partition(net(), 2, deadline_s=value)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gp.plan(3, 2), r"plan\(\) takes a torch.nn.Module, not a int"),
        (lambda: gp.plan(nn.Linear, 2), r"plan\(\) takes a torch.nn.Module, not a type"),
        (lambda: gp.plan(gp.partition(net(), 2), 2), r"partitioned already; give plan\(\) the original"),
        (lambda: gp.plan(net(), 2, 3), "args has to be a tuple.*not a int"),
        (lambda: gp.plan(net(), 2, (X,), 3), "kwargs has to be a mapping.*not a int"),
        (lambda: gp.partition(net(), plan=3), "plan=3; give a graphpart.Plan"),
        (lambda: gp.partition(net(), 2, plan={}), "plan={}; give a graphpart.Plan"),
        (lambda: gp.plan(net(), 2, (torch.randn(0, 4),)), r"'args\[0\]' is \[0, 4\].*empty batch"),
        (lambda: gp.partition(net(), 2)(torch.randn(0, 4)), r"'args\[0\]' is \[0, 4\].*empty batch"),
        (lambda: gp.keep_whole(3), "3 is no pattern"),
        (lambda: gp.colocate("head", 4), "4 is no pattern"),
        (lambda: gp.colocate(["head"]), "is no pattern"),
        (lambda: gp.plan(net(), 2, (X,), strategy={3: 0}), "3 is no pattern"),
        (lambda: gp.split("0", "n", {0: INF, 1: 1}), "device 0 gets a share of inf; give a number above 0"),
        (lambda: gp.split("0", "n", {0: 1, 1: NAN}), "device 1 gets a share of nan"),
        (lambda: gp.Async(stash_weights="a"), "stash_weights='a'.*True or False"),
        (lambda: gp.preset(3), "3 is no preset"),
        (lambda: gp.simulate(3), "takes a graphpart.Plan, not 3"),
        (lambda: gp.simulate(gp.partition(net(), 2).plan), "has one after its first call"),
        (lambda: gp.simulate(gp.plan(net(), 2, (X,)), 3), "calibration=3"),
        (lambda: gp.calibrate(net(), X), "not a Sequential"),
        (lambda: gp.calibrate(gp.partition(net(), 2), X, num_rounds=0), "num_rounds=0"),
    ],
)
def test_odd_calls_are_refused(make: Any, message: str) -> None:
    with pytest.raises(gp.GraphpartError, match=message):
        make()


def test_a_later_empty_batch_runs() -> None:
    parted = gp.partition(net(), 2, strategy="layer", num_microbatches=2)
    parted(X)
    assert parted(torch.randn(0, 4)).shape == (0, 3)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda p: {"optimizer": "adam"}, "optimizer='adam'; give a torch.optim.Optimizer"),
        (lambda p: {"optimizer": torch.optim.Adam}, "give a torch.optim.Optimizer"),
        (lambda p: {"optimizer": sgd(net().parameters())}, "has 4 parameters, but none of this model's"),
        (lambda p: {"optimizer": sgd(p.parameters()), "scaler": 3}, "scaler=3; give a torch.amp.GradScaler"),
        *[
            (lambda p, n=norm: {"optimizer": sgd(p.parameters()), "clip_grad_norm": n}, "clip_grad_norm=.* above 0")
            for norm in ("a", -1, 0, NAN, True)
        ],
    ],
)
def test_a_step_refuses_what_would_not_train_the_model(options: Any, message: str) -> None:
    parted = gp.partition(net(), 2, strategy="layer")
    with pytest.raises(ArgumentError, match=message):
        parted.train_step(X, loss_fn=square, **options(parted))


def test_an_optimizer_of_some_of_the_parameters_and_of_others_is_taken() -> None:
    parted = gp.partition(net(), 2, strategy="layer")
    first, *rest = parted.parameters()
    before = [p.detach().clone() for p in (first, *rest)]
    optimizer = sgd([first, nn.Parameter(torch.ones(1))])
    parted.train_step(X, loss_fn=square, optimizer=optimizer, clip_grad_norm=INF)
    assert not torch.equal(first, before[0]) and all(map(torch.equal, rest, before[1:]))


def square(result: torch.Tensor) -> torch.Tensor:
    return result.square().mean()
