"""What a form of call is: all that processes must have alike before they run it together."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphpart.errors import ExecutionError, GraphError, RanksDifferError
from graphpart.ir.graph import Graph, Operator
from graphpart.module.optimizer_watch import OPTIMIZER, OptimizerWatch
from graphpart.planning.codec import encode, placement_to_dict
from graphpart.planning.plan import Plan
from graphpart.runtime.executors.fingerprint import ARGUMENTS, CALL, Claim, Fact, Fingerprint, FingerprintPart
from graphpart.runtime.executors.launch import Executor
from graphpart.runtime.executors.rank_compare import alone, contents, facts_of, sizes_of
from graphpart.trace import Traced

_NOT_COMPARED = frozenset({"strategy", "strategy_options", "deadline_s"})
"""Choices that say nothing of their own: the plan has what became of a strategy, and the shorter deadline holds."""


@dataclass(frozen=True)
class CallForm:
    """One form of call, as it was when its trace was made.

    Attributes:
        is_step: whether it is a fused training step, not a plain call.
        traced: what is computed.
        plan: where.
        mode: training, autocast and grad modes.
        weights: values of parameters and buffers; none unless they are to be compared.
        watch: what optimizers have done since the last call.
        made_s: how long it took to trace and plan; the first call waits for the others so much longer.
    """

    is_step: bool
    traced: Traced
    plan: Plan
    mode: tuple[Fact, ...]
    weights: tuple[Fact, ...]
    watch: OptimizerWatch
    made_s: float

    @property
    def what(self) -> str:
        """What such a call is, in words."""
        return f"{'train_step' if self.is_step else 'forward'} of {self.plan.graph.name}"

    def claim(
        self, leaves: Sequence[Any], seed: int, *, dropout_off: bool, update: Callable[[], tuple[Fact, ...]]
    ) -> Claim:
        """What this process claims to be doing when it runs a call of this form.

        Args:
            leaves: flattened arguments.
            seed: of the step.
            dropout_off: whether dropout passes everything.
            update: what a fused step does with gradients.
        """
        stepped = self.watch.take()
        wait_s = self.plan.deadline_s + (0.0 if "_digest" in self.__dict__ else self.made_s)

        def texts() -> list[str]:
            facts = [*update(), *stepped]
            return [self._digest, str(dropout_off), *contents(leaves), *(text for fact in facts for text in fact.key)]

        def fingerprint() -> Fingerprint:
            called, *fixed = self._parts
            mode = (Fact("dropout", "off" if dropout_off else "as traced"),)
            return Fingerprint(
                (
                    called,
                    FingerprintPart(ARGUMENTS, self._arguments(leaves)),
                    FingerprintPart("the mode of the call", mode),
                    *fixed,
                    FingerprintPart("the update", tuple(update())),
                    FingerprintPart(f"{OPTIMIZER} of the last step", stepped),
                )
            )

        return Claim(self.what, wait_s, texts, fingerprint, seed=seed)

    def backward_claim(self, seeds: Mapping[str, Tensor]) -> Claim:
        """What this process claims when it first runs backward from these outputs.

        Args:
            seeds: gradients of outputs.
        """
        what = f"backward of {self.plan.graph.name}"
        shapes = tuple(Fact(name, f"{tensor.dtype} {list(tensor.shape)}") for name, tensor in sorted(seeds.items()))
        parts = FingerprintPart(CALL, (Fact(what),)), FingerprintPart("outputs that got a gradient", shapes)
        return alone(what, self.plan.deadline_s, *parts, sizes=sizes_of(seeds.values()))

    @cached_property
    def _digest(self) -> str:
        return Fingerprint(self._parts).digest

    @property
    def _parts(self) -> tuple[FingerprintPart, ...]:
        """What is the same in every call of this form; large, so that only its digest is kept."""
        graph, plan = self.traced.graph, self.plan
        parts = {
            CALL: (Fact(self.what),),
            "versions": _versions(),
            "the mode": self.mode,
            "the choices": _choices(plan),
            "the parameters and buffers": tuple(_sources(graph, "parameter", "buffer")),
            "the graph": tuple(_graph(graph)),
            "constants": facts_of(self.traced.constants),
            "the plan": tuple(_plan(plan)),
            "the messages": tuple(
                Fact(f"message {b.tag}", f"{b.wire} of {b.size_bytes} bytes from device {b.source} to {b.destination}")
                for b in plan.program.bridges
            ),
            "the schedule": _schedule(plan) if self.is_step else (),
            "the weights": self.weights,
        }
        return tuple(FingerprintPart(name, facts) for name, facts in parts.items())

    def _arguments(self, leaves: Sequence[Any]) -> tuple[Fact, ...]:
        names = {self.traced.input_index[s.value.name]: s.names[0] for s in self.traced.graph.inputs}
        texts = contents(leaves)
        kinds = [
            f", requires_grad={x.requires_grad}, on {x.device.type}" if isinstance(x, Tensor) else "" for x in leaves
        ]
        return tuple(
            Fact(names.get(i, f"leaf {i} of the arguments"), f"{text}{kind}")
            for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))
        )


@contextmanager
def refused_by_all(executor: Executor[Any], what: str, deadline_s: float) -> Iterator[None]:
    """A call that one process refuses before it runs is refused by all.

    Args:
        executor: who would run it.
        what: the call, in words.
        deadline_s: how long to wait for the others.

    Raises:
        RanksDifferError: if another process goes on, or refuses it elsewhere.
    """
    before, start_s = executor.num_compared, time.monotonic()
    try:
        yield
    except Exception as reason:
        if executor.distributed and executor.num_compared == before:
            # The others may take as long to come as far.
            _tell_refusal(executor, what, deadline_s + time.monotonic() - start_s, reason)
        raise


def _tell_refusal(executor: Executor[Any], what: str, deadline_s: float, reason: Exception) -> None:
    said = Fact(f"an error before {what} ({type(reason).__name__}: {reason})")
    part = FingerprintPart(CALL, (said,))
    try:
        executor.check_same(Claim(what, deadline_s, lambda: ["refused"], lambda: Fingerprint((part,))))
    except RanksDifferError:
        raise
    except ExecutionError as absent:
        reason.add_note(f"The other processes could not be told: {absent}")


def mode_of(module: nn.Module, kinds: Iterable[str]) -> tuple[Fact, ...]:
    """The modes in which a model is called now.

    Args:
        module: the model.
        kinds: kinds of the devices in use.
    """
    words = {True: "in training mode", False: "in eval mode"}
    found = [Fact("the model", words[module.training])]
    found += [
        Fact(f"module {path}", words[m.training]) for path, m in module.named_modules() if m.training != module.training
    ]
    for kind in dict.fromkeys(kinds):
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else "off"
        found.append(Fact(f"autocast on {kind}", f"{dtype}"))
    return (*found, Fact("grad mode", "on" if torch.is_grad_enabled() else "off"))


def _versions() -> tuple[Fact, ...]:
    """Of the libraries; a build for GPUs and one for CPUs alone are the same version."""
    own = importlib.import_module("graphpart").__version__
    return Fact("torch", torch.__version__.partition("+")[0]), Fact("graphpart", own)


def _choices(plan: Plan) -> tuple[Fact, ...]:
    found = [Fact("strategy", plan.strategy)]
    for field in fields(plan.choices):
        value = getattr(plan.choices, field.name)
        if field.name not in _NOT_COMPARED:
            found.append(Fact(field.name, repr(sorted(value.items()) if isinstance(value, Mapping) else value)))
    return tuple(found)


def _sources(graph: Graph, *kinds: str) -> Iterator[Fact]:
    for source in graph.sources:
        value, tied = source.value, source.names[1:]
        if source.kind in kinds:
            detail = f"{value.dtype} {list(value.shape)}{', trainable' if source.trainable else ''}"
            yield Fact(f"{source.kind} {source.names[0]}", detail + "".join(f", also called {name}" for name in tied))


def _graph(graph: Graph) -> Iterator[Fact]:
    """Inputs, operators, outputs: each fact is one that stands in an error by itself."""
    yield Fact("sample_dims", repr(sorted(graph.sample_dims.items())))
    yield from _sources(graph, "input", "constant")
    for op in graph.operators:
        results = ", ".join(f"{v.name} {v.dtype} {list(v.shape)} {v.requires_grad}" for v in op.results)
        line = op.source_line
        yield Fact(
            _named(op),
            f"({_written(op.args)}, {_written(dict(op.kwargs))}) -> {results} {op.random} {op.recompute}",
            f"{Path(line.file).name}:{line.line}" if line is not None else "",
        )
    for output in graph.outputs:
        yield Fact("output", _written(output))
    for name, value_name in graph.mutations:
        yield Fact(f"update of {name}", value_name)


def _plan(plan: Plan) -> Iterator[Fact]:
    data = placement_to_dict(plan.placement)
    for op in plan.graph.operators:
        tiles = data["tiles"].get(op.name)
        place = f"on device {tiles}" if isinstance(tiles, int) else f"as {json.dumps(tiles)}"
        again = plan.placement.recompute.get(op.name)
        yield Fact(_named(op), place + (f", run again with {again}" if again else ""))
    for source in plan.graph.sources:
        if source.kind != "input":
            home = [(shard.device, str(shard.region)) for shard in plan.placement.home(source.value)]
            yield Fact(f"{source.kind} {source.names[0]}", f"at home on {home}")


def _schedule(plan: Plan) -> tuple[Fact, ...]:
    schedule = plan.training.schedule
    lines = [Fact(f"the order of device {i}", " ".join(map(str, line))) for i, line in enumerate(schedule.tasks)]
    return (Fact("the schedule", schedule.name), *lines)


def _named(op: Operator) -> str:
    return f"{op.target} at {op.module_path}" if op.module_path else f"{op.target} of the model itself"


def _written(argument: Any) -> str:
    """An argument as text that is the same in every process."""
    try:
        return json.dumps(encode(argument))
    except (GraphError, TypeError):
        return f"{type(argument).__module__}.{type(argument).__qualname__}"
