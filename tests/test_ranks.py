"""Processes that are about to do different things say so, on each of them and before anything runs."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphpart as gp
from graphpart.module.call_form import CallForm, mode_of
from graphpart.module.optimizer_watch import OptimizerWatch
from graphpart.runtime.executors.fingerprint import CALL, Fact, Fingerprint, FingerprintPart
from tests.helpers.processes import run_processes
from tests.helpers.rank_cases import CASES, WIDTH, Net

DEADLINE_S = 2.0


def _print(**parts: tuple[Fact, ...]) -> Fingerprint:
    return Fingerprint(tuple(FingerprintPart(name.replace("_", " "), facts) for name, facts in parts.items()))


RELU = Fact("aten.relu at act", "([x])", "net.py:3")
TANH = Fact("aten.tanh at act", "([x])", "net.py:3")
LINEAR = Fact("aten.linear at out", "([x]) -> y float32 [4, 6]", "net.py:4")


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        ((RELU, LINEAR), (RELU._replace(where="other.py:9"), LINEAR), ""),
        (
            (TANH, LINEAR),
            (RELU, LINEAR),
            "rank 1 has aten.tanh at act (net.py:3) where rank 0 has aten.relu at act (net",
        ),
        ((RELU, LINEAR), (RELU,), "rank 1 has aten.linear at out (net.py:4) where rank 0 has no more"),
        ((RELU,), (RELU, LINEAR), "rank 0 has aten.linear at out (net.py:4) where rank 1 has no more"),
        ((Fact("lr", "0.2"),), (Fact("lr", "0.1"),), "rank 1 has lr 0.2 where rank 0 has 0.1."),
        ((Fact("f", "b" * 999 + "!"),), (Fact("f", "b" * 999 + "?"),), "bbb! where rank 0 has …bbb"),
        ((), (RELU,), "rank 0 has aten.relu"),
    ],
)
def test_a_difference_is_said_in_words(own: tuple[Fact, ...], other: tuple[Fact, ...], said: str) -> None:
    found = _print(the_graph=own).difference(_print(the_graph=other), "rank 1", "rank 0")
    assert bool(found) == bool(said)
    assert not said or (found.startswith("the graph: ") and said in found), found
    assert len(found) < 600


def test_the_first_part_that_differs_is_told_and_the_others_are_named() -> None:
    mine = _print(versions=(), the_mode=(Fact("grad mode", "on"),), the_graph=(RELU,), the_plan=(LINEAR,))
    its = _print(versions=(), the_mode=(Fact("grad mode", "off"),), the_graph=(TANH,), the_plan=(LINEAR,))
    said = mine.difference(its, "rank 2", "rank 0")
    assert said.startswith("the mode: rank 2 has grad mode on where rank 0 has off (and in the graph). ")
    call = _print(**{CALL: (Fact("forward of Net"),)}, the_graph=(RELU,))
    assert "(and in" not in call.difference(_print(**{CALL: (Fact("backward of Net"),)}), "rank 1", "rank 0")


def test_a_fingerprint_travels_as_it_is() -> None:
    sent = _print(the_graph=(RELU, LINEAR), the_mode=(Fact("naïve", "\ud800"),))
    found = Fingerprint.loaded(sent.dumped())
    assert found == sent
    assert found.digest == sent.digest
    assert sent.digest != _print(the_graph=(RELU,), the_mode=(LINEAR,)).digest


def test_an_optimizer_is_known_by_kind_groups_and_hyper_parameters() -> None:
    parted = gp.partition(Net(), 2)
    watch: OptimizerWatch = parted._traces.watch
    first, *rest = parted.parameters()
    made = [
        torch.optim.SGD([first, *rest], lr=0.1),
        torch.optim.SGD([first, *rest], lr=0.2),
        torch.optim.SGD([*rest, first], lr=0.1),
        torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=0.1),
        torch.optim.SGD([first, *rest], lr=torch.tensor(0.1)),
        torch.optim.AdamW([first, *rest], lr=0.1),
    ]
    assert len({watch.facts(optimizer) for optimizer in made}) == len(made)
    assert watch.facts(torch.optim.SGD([first, *rest], lr=0.1)) == watch.facts(made[0])
    before = watch.facts(made[0])
    made[0].add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert watch.facts(made[0]) != before
    assert watch.facts(torch.optim.SGD([nn.Parameter(torch.ones(1))])) == ()


def test_a_form_of_call_is_the_same_wherever_it_is_made() -> None:
    forms: list[CallForm] = []
    for act in (torch.relu, torch.relu, torch.tanh):
        parted = gp.partition(Net(depth=1, act=act), 2, strategy={"*": 0})
        call, leaves = parted._traces.find((torch.ones(2, WIDTH),), {})
        forms.append(call.form)
        assert call.form.claim(leaves, 7, dropout_off=False, update=tuple).seed == 7
    claims = [form.claim(leaves, 0, dropout_off=False, update=tuple) for form in forms]
    assert list(claims[0].texts()) == list(claims[1].texts()) != list(claims[2].texts())
    assert list(forms[0].claim(leaves, 0, dropout_off=True, update=tuple).texts()) != list(claims[0].texts())
    said = claims[2].fingerprint().difference(claims[0].fingerprint(), "rank 1", "rank 0")
    assert re.match(r"the graph: rank 1 has aten.tanh.*where rank 0 has aten.relu", said), said
    assert claims[0].fingerprint().difference(claims[1].fingerprint(), "rank 1", "rank 0") == ""
    assert mode_of(Net().eval(), ["cpu"])[0] == Fact("the model", "in eval mode")


def _disagree(rank: int, world: int, folder: str) -> None:
    """Each case in turn, in one group of processes: an error leaves it as it was."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.save({name: case(rank) for name, case in CASES.items()}, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.processes
def test_each_difference_is_named_on_every_rank() -> None:
    folder = run_processes(_disagree, 2, timeout_s=300)
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
    wrong = [
        f"{name}: {first[name]} | {second[name]}"
        for name, case in CASES.items()
        if first[name] != second[name]
        or not first[name].startswith("RanksDifferError: ranks differ in ")
        or not re.search(case.want, first[name])
    ]
    assert not wrong, "\n".join(wrong)


def _late(parted: nn.Module) -> None:
    time.sleep(DEADLINE_S + 2)
    parted(torch.ones(4, WIDTH))


ABSENT = {
    "late": (_late, "DeadlineError: rank 2 did not come within 2 s"),
    "ended": (lambda parted: os._exit(0), "ExecutionError: rank 2 has ended"),
    "elsewhere": (lambda parted: parted.state_dict(), "DeadlineError: rank 2 did not come within 2 s"),
}
"""What the last of three processes does while the others call the model, and what they say."""


def _absent(rank: int, world: int, what: str, folder: str) -> None:
    """One call on all processes; a second on all but the last."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parted = gp.partition(Net(), world, strategy={"layers.0": 0, "*": 1}, deadline_s=DEADLINE_S)
    x = torch.ones(4, WIDTH)
    parted(x)
    start_s = time.monotonic()
    try:
        ABSENT[what][0](parted) if rank == world - 1 else parted(x)
    except gp.GraphpartError as error:
        Path(f"{folder}/rank{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    assert (
        time.monotonic() - start_s < DEADLINE_S + 15
    )  # the first to see the fault stays until the others have read it
    os._exit(0)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("what", ABSENT)
def test_a_process_that_does_not_come_is_named_on_every_other(what: str) -> None:
    folder = run_processes(_absent, 3, what)
    for rank in range(3 if what == "late" else 2):
        text = (folder / f"rank{rank}.txt").read_text()
        assert text.startswith(ABSENT[what][1]), (rank, text)
        assert "forward of Net, which every process has to call" in text, text
    if what == "elsewhere":  # told by the others, unless these have ended before it asks
        assert (folder / "rank2.txt").read_text().startswith(("DeadlineError: rank 2 did not", "ExecutionError: this "))
