"""A call that is no single graph: TorchDynamo cuts it up, and runs the Python between and behind its graphs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from graphpart.errors import GraphpartError, TraceError, UnsupportedOperatorError
from graphpart.module.coverage import IslandReport
from graphpart.module.fused_update import Update
from graphpart.module.traced_call import StepReport, TracedCall
from graphpart.planning.plan import Plan
from graphpart.trace import Loss, trace
from graphpart.trace.dynamo.islands import halved, islands_in, split
from graphpart.trace.dynamo.piece import Cut, cut_out
from graphpart.trace.dynamo.watch import (
    Bindings,
    GraphBreak,
    changes_bounded_deque,
    copied,
    places_of,
    settings,
    without_modes,
)
from graphpart.trace.tree import flatten

if TYPE_CHECKING:
    from graphpart.module.traces import Traces


@dataclass
class Running:
    """How a call is being run, and what its graphs have done.

    Attributes:
        dropout_off: whether dropout passes everything.
        record: whether to note when each task ran.
        update: what a training step does with gradients; None for a plain call.
        reports: of the graphs so far.
        num_islands: graphs so far that ran as they are.
        is_updated: whether a graph has done the update, too.
    """

    dropout_off: bool = False
    record: bool = False
    update: Update | None = None
    reports: list[StepReport] = field(default_factory=list)
    num_islands: int = 0
    is_updated: bool = False


class Pieces:
    """One way to call a model, cut into graphs by TorchDynamo, whose guards decide when to cut anew.

    Each graph is traced, planned and run as a whole model is. What of it cannot be traced runs as it is, on one
    device: an island. Parameters keep the homes that the first graph to use them gave them.

    Attributes:
        traces: makes and plans traces.
        islands: what runs as it is.
        plans: of the graphs that are planned.
        read: parameters that graphs and islands read, by name.

    Args:
        traces: makes and plans traces.
        call: the function to follow.
    """

    def __init__(self, traces: Traces, call: Any) -> None:
        self.traces = traces
        self.islands: list[Island] = []
        self.plans: list[Plan] = []
        self.read: set[str] = set()
        self._compiled = torch.compile(copied(call), backend=self._backend, dynamic=False)
        self._running = threading.local()

    def _backend(self, graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        if changes_bounded_deque():
            raise GraphBreak("it changes a deque of limited length")  # so this much of the call runs as it is
        return GraphPiece(self, graph, places_of(graph))

    @property
    def current(self) -> Running:
        """What the calling thread is running."""
        found: Running = self._running.now
        return found

    def run(self, bindings: Bindings, how: Running) -> Any:
        """Call the model, each graph on its devices."""
        before, self._running.now = getattr(self._running, "now", None), how
        try:
            # Where parameters are tiled, others stand in for them, which pieces know by name.
            with settings(suppress_errors=True), without_modes(), self.traces.state.shapes_only():
                return self._compiled(**bindings)
        finally:
            self._running.now = before


_Key = tuple[Any, ...]


class GraphPiece(nn.Module):
    """One graph of a call; it is traced when it first runs, and again for other parameters or shapes.

    Args:
        pieces: the call.
        graph: the graph.
        places: per input, where TorchDynamo found it.
    """

    pieces: Pieces
    graph: GraphModule
    places: tuple[str, ...]
    calls: dict[_Key, tuple[Cut, TracedCall] | GraphModule]

    def __init__(self, pieces: Pieces, graph: GraphModule, places: Sequence[str]) -> None:
        super().__init__()
        hidden = self.__dict__  # past __setattr__, as these are no submodules
        hidden["pieces"], hidden["graph"], hidden["places"] = pieces, graph, tuple(places)
        hidden["calls"] = {}

    def forward(self, *inputs: Any) -> Any:
        """The graph's results."""
        state = self.pieces.traces.state
        self.pieces.traces.follow_tensors()  # a forward may register what its next graph reads
        owned = tuple(state.name_of(x) if isinstance(x, Tensor) else None for x in inputs)
        self.pieces.read.update(filter(None, owned))
        key = tuple(name or _kind(x) for name, x in zip(owned, inputs, strict=True))
        if key not in self.calls:
            self.calls[key] = self._make(owned, inputs)
        found = self.calls[key]
        if isinstance(found, GraphModule):
            return found(*inputs)
        cut, call = found
        result = self._run(call, flatten(((), cut.arguments(inputs)))[0], cut.has_loss)
        return result[1] if cut.has_loss else result

    def _run(self, call: TracedCall, leaves: list[Any], has_loss: bool) -> Any:
        """A training step is fused if nothing came before the graph that has its loss."""
        running = self.pieces.current
        how: Any = {"dropout_off": running.dropout_off, "record": running.record}
        is_first = not running.reports and not running.num_islands
        is_fed = any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
        if running.update is not None and has_loss and is_first and not is_fed:
            result, report = call.train(leaves, running.update, **how)
            running.is_updated = True
        else:
            result, report = call.run(leaves, **how)
        running.reports.append(report)
        return result

    def _make(self, owned: Sequence[str | None], inputs: Sequence[Any]) -> tuple[Cut, TracedCall] | GraphModule:
        """Trace and plan the graph, or else split it into parts that can be traced and islands."""
        traces, since_s = self.pieces.traces, time.monotonic()
        model = traces.module
        cut = cut_out(self.graph, self.places, owned, inputs, type(model).__name__, model.training)
        arguments = cut.arguments(inputs)
        wanted = {name: dim for name, dim in traces.sample_dims.items() if name in arguments}
        try:
            traced = trace(cut.module, (), arguments, sample_dims=wanted)
        except TraceError as reason:
            if traces.state.is_spread:
                raise
            return self._split(cut.stopped_at, str(reason))
        call = traces.compiled(traced, is_step=cut.has_loss, since_s=since_s, is_piece=True)
        try:
            call.check_memory(flatten(((), arguments))[0])
        except UnsupportedOperatorError as reason:  # its inputs share memory that it changes
            if traces.state.is_spread:
                raise
            return self._split_at(frozenset(node.name for node in self.graph.graph.nodes), str(reason))
        self.pieces.plans.append(call.plan)
        return cut, call

    def _split(self, stopped_at: str, why: str) -> GraphModule:
        islands = islands_in(self.graph, stopped_at)
        if islands:
            return self._split_at(islands, why)
        halves = halved(self.graph)  # what is wrong shows only in the whole, but may lie in a part
        if halves is None:
            return self._split_at(frozenset(node.name for node in self.graph.graph.nodes), why)
        return self._parts(*halves, why)

    def _split_at(self, islands: frozenset[str], why: str) -> GraphModule:
        return self._parts(*split(self.graph, islands), why)

    def _parts(self, parent: GraphModule, kinds: Mapping[str, bool], why: str) -> GraphModule:
        """A graph of parts, with what runs each."""
        for name, is_island in kinds.items():
            part = parent.get_submodule(name)
            assert isinstance(part, GraphModule)
            if is_island:
                island = Island(self.pieces, part, why)
                self.pieces.islands.append(island)
                parent.add_module(name, island)
            else:
                places = [""] * sum(node.op == "placeholder" for node in part.graph.nodes)
                parent.add_module(name, GraphPiece(self.pieces, part, places))
        return parent


class Island(nn.Module):
    """A part of a graph that runs as it is, where its inputs are.

    Args:
        pieces: the call.
        graph: the part.
        why: what keeps it from being lowered.
    """

    pieces: Pieces

    def __init__(self, pieces: Pieces, graph: GraphModule, why: str) -> None:
        super().__init__()
        self.__dict__["pieces"] = pieces
        self.graph, self.why = graph, why
        self.flops: float | None = None  # of one forward, from the first on

    def forward(self, *inputs: Any) -> Any:
        """The graph's results."""
        self.pieces.current.num_islands += 1
        if self.flops is not None or torch.is_inference_mode_enabled():  # where nothing can be counted
            return self.graph(*inputs)
        with FlopCounterMode(display=False) as counter:
            results = self.graph(*inputs)
        self.flops = float(counter.get_total_flops())
        return results

    @property
    def report(self) -> IslandReport:
        """What runs as it is, and why."""
        operators = tuple(node.name for node in self.graph.graph.nodes if node.op.startswith("call"))
        return IslandReport(operators, self.why, self.flops or 0.0)


def _kind(value: Any) -> Any:
    """What a trace depends on of an input that is no parameter."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    leaves, spec = pytree.tree_flatten(value)  # an island may give several values as one
    return (type(value), value) if spec.is_leaf() else (spec, *map(_kind, leaves))


@dataclass
class PieceCall:
    """A call in pieces, ready to be run as a :class:`~graphpart.module.traced_call.TracedCall` is.

    Attributes:
        pieces: how the model is called.
        bindings: the arguments.
        loss: what stands behind the model, if something does.
    """

    pieces: Pieces
    bindings: Bindings
    loss: Loss | None

    def run(
        self, _: Sequence[Any], *, dropout_off: bool = False, record: bool = False
    ) -> tuple[Any, StepReport | None]:
        """Run the model.

        Args:
            dropout_off: whether dropout passes everything.
            record: whether to note when each task ran.

        Returns:
            The model's result, and what its last graph did, if it has one.
        """
        running = Running(dropout_off, record)
        result = self.pieces.run(self.bindings, running)
        return result, running.reports[-1] if running.reports else None

    def train(
        self, _: Sequence[Any], update: Update, *, dropout_off: bool = False, record: bool = False
    ) -> tuple[Any, StepReport | None]:
        """Run forward, loss, backward and update: as a fused step if all is one graph, else one after the other.

        Args:
            update: what to do with the gradients.
            dropout_off: whether dropout passes everything.
            record: whether to note when each task ran.
        """
        assert self.loss is not None
        running = Running(dropout_off, record, update)
        loss, outputs = self.pieces.run(self.bindings, running)
        if not running.is_updated:
            update.follow(loss)
        outputs = pytree.tree_map_only(Tensor, Tensor.detach, outputs) if self.loss.with_outputs else None
        return (loss.detach(), outputs), running.reports[-1] if running.reports else None

    @property
    def plan(self) -> Plan:
        """Of the first graph that such calls have had.

        Raises:
            GraphpartError: if none has run yet.
        """
        if not self.pieces.plans:
            raise GraphpartError("a model of several graphs is planned as it runs; call it once")
        return self.pieces.plans[0]

    @property
    def fused(self) -> None:
        """A step in pieces has no order that is known before."""
        return None
