"""State cases: small models that read and change state, called several times with changes between the calls.

A case says what is read, where that lives, how it changes and when; what the forward itself changes; how it keeps
gradients out; what its parts are called; and how it is called. It is played twice from the start, by the plain model
and by a partitioned one, and after each call all that can be seen is compared: results, gradients, parameters, buffers,
the Python state of all modules, training flags, random streams, and that no fake tensor is left.

Run it by hand with ``python -m tests.state_cases --examples 2500 --seed 0``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import GraphpartError
from tests.helpers.state_effects import EFFECTS, STOPS
from tests.helpers.state_models import EVENTS, INPUTS, Host, Loss, LossModule, Names, Root, Spec, built, class_of, reset
from tests.helpers.state_seen import differences, seen
from tests.helpers.state_values import KINDS, PLACES, is_possible

STRATEGIES: dict[str, Any] = {"layer": "layer", "batch": "batch", "feature": "feature", "by hand": {"lin": 0, "*": 1}}
LAYOUTS = ("plain", "transposed", "sliced", "expanded")
MODES = ("no_grad", "inference", "autocast", "default dtype")
VALUE_EVENTS = ("next", "back", "mutate", "anew", "same")
CHILDREN = ("args", "kwargs", "model", "function", "given", "module", "plan", "x", "graph", "L", "0")
BUFFERS = ("x", "y", "given", "target", "args", "bias", "lin_weight", "mul", "loss")
PARAMETERS = ("mean", "exp", "add", "tanh", "weight", "x_1", "self", "linear", "graphpart", "L", "sum")


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        batch: its number of samples.
        layout: how the input lies in memory.
        second: the second argument: none, another tensor, or the same.
        mode: in which mode of torch; empty for none.
        before: events before it.
        between: an event between forward and backward; empty for none.
        wants_input: whether the input requires a gradient.
        is_step: whether it is a ``train_step``.
    """

    batch: int = 4
    layout: str = "plain"
    second: str = ""
    mode: str = ""
    before: tuple[str, ...] = ()
    between: str = ""
    wants_input: bool = False
    is_step: bool = False


@dataclass(frozen=True)
class Case:
    """A model and how it is called; see the module."""

    seed: int
    root: Spec
    body: Spec
    core: Spec
    loss: Spec
    loss_is_module: bool
    names: Names
    looks: str
    strategy: str
    num_microbatches: int
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        shown = {"root": self.root, "body": self.body, "core": self.core, "loss": self.loss}
        specs = "; ".join(f"{name} {spec}" for name, spec in shown.items() if spec != Spec())
        plain = Call()
        calls = ["/".join(f"{k}={v}" for k, v in vars(c).items() if v != getattr(plain, k)) or "-" for c in self.calls]
        extra = "" if self.names == Names() else f"; {self.names}"
        extra += f"; looks at {self.looks}" if self.looks else ""
        return f"seed {self.seed}: {specs}{extra}; {self.strategy} x{self.num_microbatches}; " + " | ".join(calls)


# --- drawing ----------------------------------------------------------------------------------------------------------


def random_case(seed: int) -> Case:
    """A case; the same for the same seed."""
    rng = random.Random(f"state {seed}")
    specs = [{}, {}, {}, {}]  # of root, body, core, loss
    themes = rng.choices(("read", "effect", "stop", "names", "events"), (6, 6, 2, 1, 3), k=rng.choice((1, 1, 2)))
    in_loss = False
    for theme in themes:
        at = rng.randrange(3)
        if theme == "read":
            at = rng.choice((0, 1, 2, 2, 3))
            in_loss = in_loss or at == 3
            specs[at]["kind"], specs[at]["place"] = _random_reading(rng)
        elif theme == "effect":
            specs[at]["effect"] = rng.choice(list(EFFECTS))
        elif theme == "stop":
            specs[at]["stop"] = rng.choice(list(STOPS))
    names = Names(rng.choice(CHILDREN), rng.choice(BUFFERS), rng.choice(PARAMETERS)) if "names" in themes else Names()
    if names.child in (names.buffer, names.parameter) or ("names" in themes and rng.random() < 0.2):
        names = Names(buffer=names.buffer)
    looks = rng.choice(("stride", "alias", "in place")) if "events" in themes and rng.random() < 0.4 else ""
    root, body, core, loss = (Spec(**found) for found in specs)
    steps = rng.random() < (0.9 if in_loss else 0.35)
    readers = [i for i, found in enumerate(specs) if "kind" in found]
    calls = [_random_call(rng, i, readers, "events" in themes, looks, steps) for i in range(rng.choice((3, 3, 4)))]
    return Case(
        seed,
        *(root, body, core, loss, rng.random() < 0.4, names, looks),
        rng.choice(list(STRATEGIES)),
        rng.choice((1, 1, 2)),
        tuple(calls),
    )


def _random_reading(rng: random.Random) -> tuple[str, str]:
    while True:
        kind, place = rng.choice(list(KINDS)), rng.choice(list(PLACES))
        if is_possible(kind, place):
            return kind, place


def _random_call(
    rng: random.Random, number: int, readers: Sequence[int], has_events: bool, looks: str, steps: bool
) -> Call:
    before = [rng.choice(VALUE_EVENTS) + f" {i}" for i in readers if number and rng.random() < 0.7]
    if has_events and number and rng.random() < 0.7:
        before.append(rng.choice(list(EVENTS)))
    mode = rng.choice(MODES) if rng.random() < 0.12 else ""
    is_step = steps and mode in ("", "default dtype") and rng.random() < 0.8
    between = f"next {rng.choice(readers)}" if readers and not is_step and rng.random() < 0.1 else ""
    second = rng.choice(("other", "same")) if looks in ("alias", "in place") else ""
    return Call(
        batch=rng.choice((4, 4, 4, 6)),
        layout=rng.choice(LAYOUTS) if looks == "stride" or rng.random() < 0.1 else "plain",
        second=second,
        mode=mode,
        before=tuple(before),
        between=between,
        wants_input=not is_step and looks != "in place" and rng.random() < 0.15,
        is_step=is_step,
    )


# --- playing ----------------------------------------------------------------------------------------------------------


class Void(Exception):
    """The plain model itself fails."""


@dataclass
class Player:
    """A model, what its specs are about, and what events have left."""

    case: Case
    net: Any
    hosts: list[Any]
    loss: Any
    handles: list[Any]
    at: dict[int, int]

    def happen(self, event: str) -> None:
        """Let something happen to the model."""
        if event in EVENTS:
            EVENTS[event](self.net, self.hosts, self.handles)
            return
        what, number = event.rsplit(" ", 1)
        owner = [*self.hosts, self.loss][int(number)]
        values = owner.values()
        now = self.at.get(int(number), 0)
        if what == "mutate":
            if owner.mutate is not None:
                owner.mutate(owner.held(getattr(owner, "to_give", None)))
                return
            what = "next"
        now = {"next": now + 1, "anew": now + 1, "back": 0, "same": now}[what] % len(values)
        self.at[int(number)] = now
        if what == "anew":
            owner.drop()
        owner.put(values[now])

    @property
    def to_give(self) -> dict[str, Any]:
        """Arguments beside the input."""
        owners = [host for host in self.hosts if "to_give" in host.__dict__]
        return {"given": owners[0].to_give} if owners else {}

    def loss_of(self, result: Tensor, target: Tensor) -> Tensor:
        """The loss, with what the forward has left on modules."""
        total = self.loss(result, target)
        for host in self.hosts:
            if "auxiliary" in host.__dict__:
                total = total + 0.1 * host.auxiliary
            if "features" in host.__dict__:
                total = total + host.features.mean()
        return total


def play(case: Case, partition: Callable[[nn.Module, Case], Any] | None) -> Iterator[dict[str, Any]]:
    """What can be seen after each call.

    Args:
        case: what to play.
        partition: makes the model that is called; None for the plain one.
    """
    bases = (Root, Host, Host, LossModule if case.loss_is_module else Loss)
    classes = [class_of(b, s) for b, s in zip(bases, (case.root, case.body, case.core, case.loss), strict=True)]
    reset(classes, case.seed)
    net, hosts = built(case.root, case.body, case.core, case.names, case.looks)
    loss = classes[3]()
    if case.loss.kind:
        loss.put(loss.values()[0])
    player = Player(case, net, hosts, loss, [], {})
    called = net if partition is None else partition(net, case)
    try:
        for number, call in enumerate(case.calls):
            for event in call.before:
                player.happen(event)
            yield one_call(player, called, call, number, is_plain=partition is None)
    finally:
        EVENTS["unhooked"](net, hosts, player.handles)


def one_call(player: Player, called: Any, call: Call, number: int, *, is_plain: bool) -> dict[str, Any]:
    """Call a model, and update its weights; what can be seen then."""
    made = torch.Generator().manual_seed(number)
    x = laid_out(torch.randn(2 * call.batch, INPUTS, generator=made, dtype=torch.float64), call)
    target = torch.randn(call.batch, INPUTS, generator=made, dtype=torch.float64)
    x.requires_grad_(call.wants_input)
    args = (x,) if not call.second else (x, x if call.second == "same" else torch.flip(x.detach(), (0,)))
    for parameter in player.net.parameters():
        parameter.grad = None
    results: dict[str, Any] = {}
    with mode(call.mode):
        if call.is_step and not is_plain:
            has_extra = any("auxiliary" in s.effect or "features" in s.effect for s in _specs(player.case))
            step = called.train_step(
                *args,
                **player.to_give,
                loss_fn=player.loss_of if has_extra else player.loss,
                target=target,
                return_outputs=True,
            )
            results["result"], results["loss"] = step.outputs, step.loss
        else:
            result = called(*args, **player.to_give)
            results["result"], results["wants gradient"] = result.detach().clone(), result.requires_grad
            if call.between:
                player.happen(call.between)
            loss = player.loss_of(result, target)
            results["loss"] = loss.detach()
            if loss.requires_grad:
                loss.backward()
    results["strides"] = results["result"].stride()
    if call.is_step:
        results.pop("wants gradient", None)
    found = {**results, "x": x.detach().clone(), "gradient of x": x.grad, **seen(player.net, player.loss)}
    with torch.no_grad():
        for parameter in player.net.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    return found


def _specs(case: Case) -> tuple[Spec, ...]:
    return (case.root, case.body, case.core)


def laid_out(x: Tensor, call: Call) -> Tensor:
    """Some samples in memory of a layout."""
    n = call.batch
    if call.layout == "transposed":
        return x[:n].t().contiguous().t()
    if call.layout == "sliced":
        return x[::2]
    return x[:1].expand(n, -1) if call.layout == "expanded" else x[:n].clone()


@contextlib.contextmanager
def mode(name: str) -> Iterator[None]:
    """A mode of torch."""
    if name == "default dtype":
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
        return
    made = {
        "": contextlib.nullcontext,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    with made[name]():  # type: ignore[operator]
        yield


# --- judging ----------------------------------------------------------------------------------------------------------


def parted(net: nn.Module, case: Case) -> Any:
    """The model split over two devices."""
    return gp.partition(net, 2, strategy=STRATEGIES[case.strategy], num_microbatches=case.num_microbatches)


@dataclass(frozen=True)
class Verdict:
    """How a case ended.

    Attributes:
        kind: right, wrong, foreign (another exception than graphpart's), refused, or void where the plain model fails.
        details: what differs, or the exception.
        call: at which call.
    """

    kind: str
    details: tuple[str, ...] = ()
    call: int = 0


def judge(case: Case, partition: Callable[[nn.Module, Case], Any] = parted) -> Verdict:
    """Play a case twice, and compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected: list[dict[str, Any]] = []
        fails = ""
        try:
            expected.extend(play(case, None))
        except Exception as error:
            fails = f"{type(error).__name__}: {error}"
        if not expected:
            return Verdict("void", (fails,))
        return _judge(case, partition, expected)


def _judge(case: Case, partition: Callable[[nn.Module, Case], Any], expected: Sequence[Mapping[str, Any]]) -> Verdict:
    """Only the calls that the plain model makes are asked for."""
    ours = play(case, partition)
    tolerance = 1e-9
    for i, plain in enumerate(expected):
        if case.calls[i].mode == "autocast":
            tolerance = 5e-2
        try:
            found = next(ours)
        except GraphpartError as error:
            ours.close()
            return Verdict("refused", (f"{type(error).__name__}: {error}",), i)
        except Exception as error:
            return Verdict("foreign", (f"{type(error).__name__}: {error}", _where(error)), i)
        if wrong := differences(plain, found, tolerance):
            ours.close()
            return Verdict("wrong", tuple(wrong), i)
    ours.close()
    return Verdict("right")


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(
        f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames) if "/graphpart/" in f.filename
    )[:600]


def main(arguments: Sequence[str] | None = None) -> int:
    """Play many random cases; returns the number that are wrong."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2500, help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    with tqdm(total=options.examples, mininterval=1.0) as bar:
        for seed in range(options.seed, options.seed + options.examples):
            case = random_case(seed)
            verdict = judge(case)
            counts[verdict.kind] += 1
            if verdict.kind == "refused":
                reasons[verdict.details[0][:300]] += 1
            if verdict.kind != "right":
                bar.write(
                    f"{verdict.kind.upper()} at call {verdict.call}: {case}\n    " + "\n    ".join(verdict.details)
                )
            bar.update()
            bar.set_postfix(counts)
            if seed % 20 == 19:
                torch._dynamo.reset()  # what it keeps of models that are gone
    print(f"{options.examples} cases from seed {options.seed}: {dict(counts)}")
    for reason, number in reasons.most_common():
        print(f"  refused {number} x: {reason}")
    return counts["wrong"] + counts["foreign"]


if __name__ == "__main__":
    sys.exit(min(1, main()))
