"""Random state cases against the plain model; ``python -m tests.state_cases`` plays more of them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from graphpart.trace.dynamo.watch import Guards
from tests.helpers.state_models import Names, Spec
from tests.state_cases import Call, Case, judge, random_case

NUM_CASES = 150

PLAIN = Spec()


def case_of(
    *, root: Spec = PLAIN, body: Spec = PLAIN, core: Spec = PLAIN, names: Names | None = None, calls: tuple[Call, ...]
) -> Case:
    return Case(0, root, body, core, PLAIN, False, names or Names(), "", "layer", 1, calls)


@pytest.mark.whole
@pytest.mark.sampled(12)
@pytest.mark.parametrize("number", range(NUM_CASES))
def test_random_state_case(number: int, first_seed: int) -> None:
    case = random_case(100_000 + first_seed + number)
    verdict = judge(case)
    assert verdict.kind in ("right", "refused", "void"), f"{case}\n{verdict}"


FIXED = {
    # What a call sets and takes away in turn is as it was when the call runs.
    "toggle": case_of(body=Spec(effect="toggle"), calls=(Call(), Call(batch=6), Call())),
    # 0.0 equals -0.0.
    "sign of a zero": case_of(
        root=Spec(kind="float sign", place="property"), calls=(Call(), Call(before=("next 0",)), Call())
    ),
    # An operator on constants alone is executed by export.
    "tensor changed in place": case_of(
        core=Spec(effect="average in tensor in place"), calls=(Call(batch=6), Call(), Call())
    ),
    # A buffer changed in place beside a target: which the step takes, and the model does not.
    "buffer changed in a step": case_of(
        body=Spec(effect="average copied"), calls=(Call(is_step=True), Call(batch=6, is_step=True))
    ),
    "deque": case_of(core=Spec(effect="deque"), calls=(Call(), Call(), Call(batch=6))),
    "array changed in place": case_of(body=Spec(effect="array"), calls=(Call(), Call(batch=6), Call())),
    "names": case_of(names=Names("model", "x", "mean"), calls=(Call(wants_input=True), Call(is_step=True))),
    "class patched": case_of(calls=(Call(), Call(before=("class",)), Call())),
    "class patched behind a break": case_of(core=Spec(effect="list"), calls=(Call(), Call(before=("class",)), Call())),
    "global hook behind a break": case_of(
        core=Spec(effect="list"), calls=(Call(), Call(before=("global hook",)), Call(before=("unhooked",)))
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_state_case(name: str) -> None:
    verdict = judge(FIXED[name])
    assert verdict.kind == "right", verdict


STALE = case_of(core=Spec(kind="float", place="object"), calls=(Call(), Call(before=("next 2",))))


def test_a_stale_result_is_seen() -> None:
    with mock.patch.object(Guards, "hold", lambda *_: True):
        stale = judge(STALE)
    assert (stale.kind, stale.call) == ("wrong", 1) and any(why.startswith("result") for why in stale.details)
    assert judge(STALE).kind == "right"


def spoilt(net: nn.Module, case: Case) -> Any:
    """The plain model, wrapped as :func:`~tests.state_cases.play` wants a partitioned one."""
    return Spoilt(net, case.names.child)


class Spoilt(nn.Module):
    """A model whose calls leave something wrong, which the name of a child says."""

    def __init__(self, net: nn.Module, what: str) -> None:
        super().__init__()
        self.net, self.what = net, what

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, and spoil."""
        net: Any = self.net
        result = net(*args, **kwargs)
        if self.what == "flag":
            net.norm.eval()
        elif self.what == "state":
            net.left = 1
        elif self.what == "gradient":
            result = result.detach() + 0 * net.outlet.bias
        elif self.what == "random":
            torch.rand(1)
        elif self.what == "exception":
            raise KeyError("foreign")
        return result


@pytest.mark.parametrize(
    ("what", "kind", "word"),
    [
        ("right", "right", ""),
        ("flag", "wrong", "flags norm"),
        ("state", "wrong", "state .left"),
        ("gradient", "wrong", "parameter lin.weight"),
        ("random", "wrong", "torch random"),
        ("exception", "foreign", "KeyError"),
    ],
)
def test_what_a_call_leaves_wrong_is_seen(what: str, kind: str, word: str) -> None:
    verdict = judge(case_of(names=Names(child=what), calls=(Call(),)), spoilt)
    assert verdict.kind == kind and word in "\n".join(verdict.details), verdict


def test_the_same_seed_gives_the_same_case() -> None:
    assert random_case(7) == random_case(7) != random_case(8)
