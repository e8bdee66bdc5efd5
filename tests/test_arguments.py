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
from graphpart.errors import PlanError, TraceError

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


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_beside_a_plan_is_refused_by_name(name: str, tmp_path: Path) -> None:
    plan = gp.plan(net(), 2, (X,), strategy="single")
    for given in (plan, plan.save(tmp_path / "plan.json")):
        with pytest.raises(PlanError, match=rf"the plan says already what {name} .* leave it out.*plan\(.*{name}="):
            gp.partition(net(), plan=given, **{name: CHOICES[name]})
    with pytest.raises(PlanError, match="num_microbatches, wire_dtype would choose anew; leave them out"):
        gp.partition(net(), plan=plan, num_microbatches=2, wire_dtype="float16")


def test_every_argument_counts_beside_a_plan_or_is_refused() -> None:
    """A new argument of ``partition`` has to be one or the other."""
    count = {"model", "devices", "plan", "executor", "deadline_s"}
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
        with pytest.raises(TraceError, match=re.escape(f"sample_dims names {name!r}; the tensor inputs are 'args[0]'")):
            gp.partition(Scaled(), 2, sample_dims={name: 0})(X)
    with pytest.raises(TraceError, match=r"sample_dims gives 'args\[0\]' dimension 2, but it is \[6, 4\]; .* 0 to 1"):
        gp.plan(Scaled(), 2, (X,), sample_dims={"args[0]": 2})
