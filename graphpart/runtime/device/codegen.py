"""Turn a segment into a straight-line Python function that frees values after their last use."""

from __future__ import annotations

import functools
import linecache
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from graphpart.ir.graph import Graph, Operator, Ref, Symbol, refs
from graphpart.ir.program import Segment, Step
from graphpart.runtime.kernels.deferred import deferring_kernel
from graphpart.runtime.kernels.random_kernels import random_kernel_of
from graphpart.runtime.kernels.table import KERNELS, kernel_of
from graphpart.trace.names import resolve


@dataclass(frozen=True)
class Executable:
    """A compiled segment.

    Attributes:
        run: takes the step's randomness, the random keys, a list for what its backward leaves for later, and the
            inputs; returns the outputs as a tuple.
        keys: random keys of this instance; segments of other microbatches share the code.
        steps: the segment's steps, by line of the generated source.
        filename: name of the generated source in tracebacks.
    """

    run: Callable[..., tuple[torch.Tensor, ...]]
    keys: tuple[int, ...]
    steps: tuple[Step, ...]
    filename: str

    def step_at(self, traceback: TracebackType | None) -> Step | None:
        """The step that a traceback passes through, if it passes through this code."""
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == self.filename:
                return self.steps[traceback.tb_lineno - 2]
            traceback = traceback.tb_next
        return None


def compile_segment(
    segment: Segment, device: torch.device, graph: Graph, deferred: Mapping[int, tuple[int, ...]] | None = None
) -> Executable:
    """Generate and compile the function of one segment.

    Args:
        segment: what to run.
        device: where ``device`` arguments point.
        graph: for the names of operators in errors.
        deferred: per number of a step whose backward leaves gradients of weights for later, the positions of these
            weights among its arguments.

    Raises:
        UnsupportedOperatorError: if an operator has no way to draw its random numbers here.
    """
    writer = _Writer(segment, graph.operator, deferred or {})
    text = writer.text()
    run, filename = _compile(text, device, tuple(writer.functions))
    return Executable(run, tuple(s.key for s in segment.steps if s.key is not None), segment.steps, filename)


Function = tuple[str, str]
"""A target, and how it is called."""

_CALLABLES: Mapping[str, Callable[[str], Callable[..., Any]]] = {
    "plain": kernel_of,
    "random": lambda target: random_kernel_of(target, target),
    "deferring": deferring_kernel,
}


class _Writer:
    """Writes one line a step; locals are numbered, so equal segments of other microbatches give equal text."""

    def __init__(
        self, segment: Segment, operators: Mapping[str, Operator], deferred: Mapping[int, tuple[int, ...]]
    ) -> None:
        self.segment = segment
        self.operators = operators
        self.deferred = deferred
        self.local: dict[str, str] = {}
        self.functions: dict[Function, str] = {}
        self.last_use = _last_uses(segment)

    def text(self) -> str:
        parameters = ["random", "keys", "late", *(self._local(name) for name in self.segment.inputs)]
        lines = [f"def segment({', '.join(parameters)}):"]
        num_keys = 0
        for i, step in enumerate(self.segment.steps):
            draw = None
            if step.key is not None:
                draw = f"random(keys[{num_keys}])"
                num_keys += 1
            lines.append("    " + self._line(i, step, draw))
        lines.append(f"    return ({''.join(self.local[name] + ', ' for name in self.segment.outputs)})")
        return "\n".join(lines) + "\n"

    def _line(self, i: int, step: Step, draw: str | None) -> str:
        function = self._function(step, "random" if draw else "deferring" if i in self.deferred else "plain")
        arguments = [draw] if draw else ["late", str(i), repr(self.deferred[i])] if i in self.deferred else []
        arguments += [self._literal(a) for a in step.args]
        arguments += [f"{k}={self._literal(v)}" for k, v in step.kwargs.items()]
        call = f"{function}({', '.join(arguments)})"
        targets = [self._local(name) if name else "_" for name in step.results]
        free = [self.local[name] for name in self.last_use[i]]
        line = call
        if len(targets) == 1 and not _gives_tuple(step):
            line = f"{targets[0]} = {call}"
        elif targets:
            line = f"({', '.join(targets)},) = {call}"
        return line + (f"; del {', '.join(free)}" if free else "")

    def _local(self, name: str) -> str:
        return self.local.setdefault(name, f"v{len(self.local)}")

    def _function(self, step: Step, kind: str) -> str:
        if kind == "random":
            random_kernel_of(step.target, str(self.operators.get(step.operator, step.operator)))
        return self.functions.setdefault((step.target, kind), f"f{len(self.functions)}")

    def _literal(self, argument: Any) -> str:
        if isinstance(argument, Ref):
            return self.local[argument.name]
        if isinstance(argument, Symbol):
            return "device" if argument.kind == "device" else f"torch.{argument.name}"
        if isinstance(argument, (tuple, list)):
            return "[" + ", ".join(map(self._literal, argument)) + "]"
        if isinstance(argument, slice):
            return f"slice({', '.join(map(self._literal, (argument.start, argument.stop, argument.step)))})"
        if isinstance(argument, float) and not math.isfinite(argument):
            return f"float('{argument}')"
        return repr(argument)


def _gives_tuple(step: Step) -> bool:
    if len(step.results) > 1 or step.target == "graphpart.split":
        return True
    return step.target not in KERNELS and str(resolve(step.target)._schema.returns[0].type) == "List[Tensor]"


def _last_uses(segment: Segment) -> list[list[str]]:
    """Per step, the locals that no later step reads and that aren't returned."""
    kept = set(segment.outputs)
    free: list[list[str]] = [[] for _ in segment.steps]
    seen: set[str] = set()
    for i in reversed(range(len(segment.steps))):
        step = segment.steps[i]
        names = [ref.name for ref in refs((step.args, dict(step.kwargs)))] + [r for r in step.results if r]
        for name in dict.fromkeys(names):
            if name not in seen and name not in kept:
                free[i].append(name)
            seen.add(name)
    return free


@functools.lru_cache(maxsize=4096)
def _compile(
    text: str, device: torch.device, functions: tuple[Function, ...]
) -> tuple[Callable[..., tuple[torch.Tensor, ...]], str]:
    """Compile once per text and device; it is put where tracebacks find it."""
    filename = f"<graphpart segment {hash((text, device, functions)) & 0xFFFFFFFF:08x}>"
    scope: dict[str, Any] = {"torch": torch, "device": device, "inf": math.inf, "nan": math.nan}
    for i, (target, kind) in enumerate(functions):
        scope[f"f{i}"] = _CALLABLES[kind](target)
    exec(compile(text, filename, "exec"), scope)
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    return scope["segment"], filename
