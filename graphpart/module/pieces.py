"""A call that is no single graph: TorchDynamo cuts it up, and runs the Python between and behind its graphs."""

from __future__ import annotations

import contextlib
import threading
import time
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, unwrap_if_dead
from torch.fx import GraphModule

from graphpart.errors import GraphpartError, TraceError, UnsupportedOperatorError
from graphpart.module.fused_update import Update
from graphpart.module.island import Island
from graphpart.module.trace_key import modes_of
from graphpart.module.traced_call import StepReport, TracedCall
from graphpart.planning.plan import Plan
from graphpart.runtime.parameters.stand_ins import NoValues
from graphpart.trace import Loss, trace
from graphpart.trace.dynamo.changes import changes_bounded_deque
from graphpart.trace.dynamo.islands import halved, islands_in, split
from graphpart.trace.dynamo.piece import Cut, cut_out, form_of
from graphpart.trace.dynamo.watch import (
    Bindings,
    GraphBreak,
    code_being_compiled,
    copied,
    cut_up,
    forget,
    places_of,
    without_modes,
)
from graphpart.trace.patches import modes_kept
from graphpart.trace.tree import flatten

if TYPE_CHECKING:
    from graphpart.module.traces import Traces


@dataclass
class Running:
    """How a call is being run, and what its graphs have done.

    Attributes:
        why: what keeps the call from being one graph.
        dropout_off: whether dropout passes everything.
        record: whether to note when each task ran.
        update: what a training step does with gradients; None for a plain call.
        reports: of the graphs so far.
        islands: what ran as it is so far.
        is_updated: whether a graph has done the update, too.
        has_new: whether a graph was met for the first time.
    """

    why: str
    dropout_off: bool = False
    record: bool = False
    update: Update | None = None
    reports: list[StepReport] = field(default_factory=list)
    islands: list[Island] = field(default_factory=list)
    is_updated: bool = False
    has_new: bool = False


class Pieces:
    """One way to call a model, cut into graphs by TorchDynamo, whose guards decide when to cut anew.

    Each graph is traced, planned and run as a whole model is, in what memory those before it leave. What of it cannot
    be traced runs as it is, on one device: an island. Parameters keep the homes that the first graph to use them gave
    them. Graphs that compute the same, though TorchDynamo has made them anew, share what was made of them.

    Attributes:
        traces: makes and plans traces.
        made: of graphs, the last :data:`MAX_GRAPHS`; the one used last comes last.
        read: parameters that graphs and islands read, by name.
        last: what the graphs of the last call did; None before the first.

    Args:
        traces: makes and plans traces.
        call: the function to follow.
    """

    def __init__(self, traces: Traces, call: Any) -> None:
        self.traces = traces
        self.made: dict[_Key, _Made] = {}
        self.read: set[str] = set()
        self.last: Running | None = None
        self._call = call
        self._running = threading.local()
        self._lock = threading.Lock()
        self._num_running = 0
        self._cut_codes: list[types.CodeType] = []
        self._compiled = self._compile()

    def _compile(self) -> Any:
        here = weakref.ref(self)  # TorchDynamo keeps the backend with the code of classes, which outlives the model

        def backend(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            pieces = here()
            assert pieces is not None
            return pieces._backend(graph, inputs)

        return cut_up(copied(self._call), backend)

    def _backend(self, graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        if changes_bounded_deque():
            raise GraphBreak("it changes a deque of limited length")  # so this much of the call runs as it is
        self._cut_codes.append(code_being_compiled())
        return GraphPiece(self, graph, places_of(graph))

    @property
    def current(self) -> Running:
        """What the calling thread is running."""
        found: Running = self._running.now
        return found

    def keep(self, key: _Key, made: _Made) -> None:
        """Keep what was made of a graph, and forget what was not used for longest."""
        self.made[key] = made
        while len(self.made) > MAX_GRAPHS:
            del self.made[next(iter(self.made))]

    def run(self, bindings: Bindings, how: Running) -> Any:
        """Call the model, each graph on its devices.

        Raises:
            UnsupportedOperatorError: if Python between the graphs reads a parameter that lies elsewhere.
            ParameterError: if it changes one.
        """
        with self._lock:
            if not self._num_running and len(self._cut_codes) > MAX_GRAPHS:
                forget(self._cut_codes)
                self._cut_codes, self._compiled = [], self._compile()
            self._num_running += 1
        self.last = how
        before, self._running.now = getattr(self._running, "now", None), how
        try:
            # Where parameters are tiled, others stand in for them, which pieces know by name.
            state = self.traces.state
            guard = NoValues() if state.is_spread else contextlib.nullcontext()
            with without_modes(), modes_kept(), state.shapes_only(), guard:
                return self._compiled(**bindings)
        finally:
            self._running.now = before
            with self._lock:
                self._num_running -= 1


_Key = tuple[Any, ...]

MAX_GRAPHS = 256
"""So many graphs of calls in pieces are kept, for each way to call a model."""


_Made = tuple[Cut, TracedCall] | GraphModule
"""What was made of a graph: a trace that is planned, or a graph of parts of which some are islands."""


class GraphPiece(nn.Module):
    """One graph of a call; it is traced when it first runs, and again for other parameters or shapes.

    Args:
        pieces: the call.
        graph: the graph.
        places: per input, where TorchDynamo found it.
    """

    graph: GraphModule
    places: tuple[str, ...]
    form: _Key

    def __init__(self, pieces: Pieces, graph: GraphModule, places: Sequence[str]) -> None:
        super().__init__()
        hidden = self.__dict__  # past __setattr__, as these are no submodules
        hidden["_pieces"], hidden["graph"], hidden["places"] = weakref.ref(pieces), graph, tuple(places)
        hidden["form"] = (form_of(graph), tuple(places))

    @property
    def pieces(self) -> Pieces:
        """The call, which the model keeps: TorchDynamo keeps this graph with the code of classes, for longer."""
        found: Pieces | None = self.__dict__["_pieces"]()
        assert found is not None
        return found

    def forward(self, *inputs: Any) -> Any:
        """The graph's results."""
        with without_modes(our_own=True):
            return self._run(inputs)

    def _run(self, inputs: tuple[Any, ...]) -> Any:
        traces = self.pieces.traces
        traces.follow_tensors()  # a forward may register what its next graph reads
        inputs = tuple(unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in inputs)
        owned = tuple(traces.state.name_of(x) if isinstance(x, Tensor) else None for x in inputs)
        self.pieces.read.update(filter(None, owned))
        kinds = tuple((name, _kind(x)) for name, x in zip(owned, inputs, strict=True))
        key = (self.form, kinds, traces.module.training, modes_of(traces.kinds))
        made = self.pieces.made.pop(key, None)
        if made is None:
            made = self._make(owned, inputs)
            self.pieces.current.has_new = True
        self.pieces.keep(key, made)
        if isinstance(made, GraphModule):
            self.pieces.current.islands += [part for part in made.children() if isinstance(part, Island)]
            return made(*inputs)
        cut, call = made
        result = self._called(call, flatten(((), cut.arguments(inputs)))[0], cut.has_loss)
        return result[1] if cut.has_loss else result

    def _called(self, call: TracedCall, leaves: list[Any], has_loss: bool) -> Any:
        """A training step is fused if nothing came before the graph that has its loss."""
        running = self.pieces.current
        how: Any = {"dropout_off": running.dropout_off, "record": running.record}
        is_first = not running.reports and not running.islands
        is_fed = any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
        if running.update is not None and has_loss and is_first and not is_fed:
            result, report = call.train(leaves, running.update, **how)
            running.is_updated = True
        else:
            result, report = call.run(leaves, **how)
        running.reports.append(report)
        return result

    def _make(self, owned: Sequence[str | None], inputs: Sequence[Any]) -> _Made:
        """Trace and plan the graph, or else split it into parts that can be traced and islands."""
        traces, since_s = self.pieces.traces, time.monotonic()
        if any(isinstance(x, Tensor) and is_functorch_wrapped_tensor(x) for x in inputs):
            return self._split_at(self._all, "it is called inside of torch.func")
        model = traces.module
        cut = cut_out(self.graph, self.places, owned, inputs, type(model).__name__, model.training)
        arguments = cut.arguments(inputs)
        wanted = {name: dim for name, dim in traces.sample_dims.items() if name in arguments}
        try:
            traced = trace(cut.module, (), arguments, sample_dims=wanted)
        except TraceError as reason:
            return self._split(cut.stopped_at, str(reason))
        beside = [report.plan for report in self.pieces.current.reports]
        call = traces.compiled(traced, is_step=cut.has_loss, since_s=since_s, beside=beside)
        try:
            call.check_memory(flatten(((), arguments))[0])
        except UnsupportedOperatorError as reason:  # its inputs share memory that it changes
            return self._split_at(self._all, str(reason))
        return cut, call

    @property
    def _all(self) -> frozenset[str]:
        return frozenset(node.name for node in self.graph.graph.nodes)

    def _split(self, stopped_at: str, why: str) -> GraphModule:
        islands = islands_in(self.graph, stopped_at)
        if islands:
            return self._split_at(islands, why)
        halves = halved(self.graph)  # what is wrong shows only in the whole, but may lie in a part
        if halves is None:
            return self._split_at(self._all, why)
        return self._parts(*halves, why)

    def _split_at(self, islands: frozenset[str], why: str) -> GraphModule:
        return self._parts(*split(self.graph, islands), why)

    def _parts(self, parent: GraphModule, kinds: Mapping[str, bool], why: str) -> GraphModule:
        """A graph of parts, with what runs each."""
        for name, is_island in kinds.items():
            part = parent.get_submodule(name)
            assert isinstance(part, GraphModule)
            if is_island:
                parent.add_module(name, Island(self.pieces.traces.state, part, why))
            else:
                places = [""] * sum(node.op == "placeholder" for node in part.graph.nodes)
                parent.add_module(name, GraphPiece(self.pieces, part, places))
        return parent


def _kind(value: Any) -> Any:
    """What a trace depends on of an input that is no parameter."""
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided else ()
        return value.shape, strides, value.dtype, value.device, value.requires_grad
    leaves, spec = pytree.tree_flatten(value)  # an island may give several values as one
    return (type(value), value) if spec.is_leaf() else (spec, *map(_kind, leaves))


@dataclass
class PieceCall:
    """A call in pieces, ready to be run as a :class:`~graphpart.module.traced_call.TracedCall` is.

    Attributes:
        pieces: how the model is called.
        bindings: the arguments.
        loss: what stands behind the model, if something does.
        why: what keeps the call from being one graph.
    """

    pieces: Pieces
    bindings: Bindings
    loss: Loss | None
    why: str

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
        running = Running(self.why, dropout_off, record)
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
        running = Running(self.why, dropout_off, record, update)
        loss, outputs = self.pieces.run(self.bindings, running)
        if not running.is_updated:
            update.follow(loss)
        outputs = pytree.tree_map_only(Tensor, Tensor.detach, outputs) if self.loss.with_outputs else None
        return (loss.detach(), outputs), running.reports[-1] if running.reports else None

    @property
    def plan(self) -> Plan:
        """Of the first graph that the last of such calls had.

        Raises:
            GraphpartError: if none has run yet.
        """
        if self.pieces.last is None or not self.pieces.last.reports:
            raise GraphpartError("a model of several graphs is planned as it runs; call it once")
        return self.pieces.last.reports[0].plan

    @property
    def fused(self) -> None:
        """A step in pieces has no order that is known before."""
        return None
