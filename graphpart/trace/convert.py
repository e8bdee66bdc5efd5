"""From an exported program to a :class:`~graphpart.ir.graph.Graph`."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from graphpart.errors import TraceError, UnsupportedOperatorError
from graphpart.ir.graph import Graph, Operator, Ref, Source, SourceLine, Symbol, Value, refs
from graphpart.trace.checkpoint import checkpoint_of
from graphpart.trace.export import export
from graphpart.trace.flat import FlatCall, argument_names
from graphpart.trace.hooks import refuse_backward_hooks
from graphpart.trace.lazy import no_new_parameters
from graphpart.trace.loss import Loss
from graphpart.trace.origin import call_path, module_path, source_line, warn_user
from graphpart.trace.probe import annotate
from graphpart.trace.randomness import Noise, is_random, noise_of
from graphpart.trace.rewrites import Layout, layout_of_argument, rewrite
from graphpart.trace.sample_dims import sample_dims_of
from graphpart.trace.traced import Traced
from graphpart.trace.tree import check_arguments

# Checks made while tracing; they say nothing about data.
_STATIC_CHECKS = {"aten._assert_tensor_metadata.default"}
# Strides differ between the trace, a kernel and a message; a reshape is right for any.
_FREE_OF_STRIDES = {"aten.view.default": "aten.reshape.default", "aten._unsafe_view.default": "aten.reshape.default"}
_NEW = {f"aten.new_{kind}.default": f"aten.{kind}.default" for kind in ("zeros", "ones", "full")}
_WITHOUT_GRADIENT = re.compile(r"aten\.(detach|\w+_like\.)")
_SYMBOL_KINDS = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


def trace(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sample_dims: Mapping[str, int | None] | None = None,
    loss: Loss | None = None,
    watches_hooks: bool = True,
    keeps_identity: bool = False,
) -> Traced:
    """Trace a model into a dataflow graph at the composite ATen level.

    Args:
        model: any module that ``torch.export`` accepts (non-strict); parameters may be on the meta device.
        args: example positional arguments.
        kwargs: example keyword arguments.
        sample_dims: per input name (``args[0]``, ``labels``), the dimension that runs over samples, or None
            if it has none; see :func:`graphpart.trace.sample_dims.sample_dims_of`.
        loss: a loss to trace behind the model; the graph's first output is then the loss.
        watches_hooks: whether forward hooks are tried out first, for those that only look on to be called later.
        keeps_identity: whether a tensor that is given twice is one object to the model, which may ask.

    Returns:
        The graph, and the trees that turn arguments into inputs and outputs into results.

    Raises:
        UnsupportedOperatorError: naming what would lose its meaning, with the user's line.
        TraceError: if export fails for another reason.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedOperatorError("a TorchScript module cannot be traced; give the nn.Module it was made from")
    named = dict(kwargs or {})
    check_arguments(args, {**named, **({} if loss is None else loss.arguments)})
    refuse_backward_hooks(model)
    flat = FlatCall(model, args, named, loss, watches_hooks, keeps_identity)
    with no_new_parameters(model):
        exported = export(model, flat.module(), flat.tensors(), has_loss=loss is not None)
    return _Converter(model, exported, flat, sample_dims or {}).run()


class _Converter:
    """One pass over an exported program; holds the names found so far."""

    def __init__(
        self,
        model: torch.nn.Module,
        exported: ExportedProgram,
        flat: FlatCall,
        sample_dims: Mapping[str, int | None],
    ) -> None:
        self.model, self.exported = model, exported
        self.flat, self.sample_dims = flat, sample_dims
        self.name_of: dict[str, str] = {}  # fx node -> value
        self.results_of: dict[str, tuple[Value, ...]] = {}  # fx node with several results -> values
        self.sources: dict[str, Source] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.noise: dict[str, Noise] = {}
        self.input_index: dict[str, int] = {}
        self.strides: dict[str, tuple[int, ...]] = {}  # per output
        self.graded: set[str] = set()  # values that may have a gradient
        self.layouts: dict[str, Layout] = {}  # per source that is addressed by strides
        self.taken = self._taken()

    def _taken(self) -> set[str]:
        """Names that no argument and no operator may have: of the model's tensors, and of lists of them."""
        names = {spec.target for spec in self.exported.graph_signature.input_specs if spec.target is not None}
        names.update(name for name, _ in self.model.named_parameters(remove_duplicate=False))
        names.update(name for name, _ in self.model.named_buffers(remove_duplicate=False))
        return names | {outer for outer, _, last in (name.rpartition(".") for name in names) if last.isdigit()}

    def _free(self, name: str) -> str:
        """A name for the value of a node: the node's own, unless a tensor of the model has it."""
        if name not in self.taken:
            return name
        nodes = {node.name for node in self.exported.graph.nodes}
        while name in self.taken or name in nodes:
            name += "_"
        return name

    def run(self) -> Traced:
        self._read_sources()
        operators = [op for node in self.exported.graph.nodes for op in self._operators(node)]
        outputs, mutations = self._read_outputs()
        operators = _drop_unused(operators, outputs, mutations)
        used = {name for op in operators for name in op.operands} | {r.name for r in refs(outputs)}
        used |= {name for pair in mutations for name in pair}
        sources = [s for s in self.sources.values() if s.value.name in used or s.kind == "input"]
        operators = annotate(operators, sources)
        _warn_of_unknown(operators)
        graph = Graph(
            name=type(self.model).__name__,
            sources=tuple(sources),
            operators=tuple(operators),
            outputs=outputs,
            mutations=mutations,
            sample_dims=sample_dims_of(
                [s for s in sources if s.kind == "input"], self.sample_dims, argument_names(self.model)
            ),
        )
        flat = self.flat
        layouts = {name: layout for name, layout in self.layouts.items() if name in self.input_index}
        return Traced(
            graph,
            flat.out_spec,
            self.input_index,
            self.constants,
            self.strides,
            flat.results,
            flat.onlookers,
            layouts,
            flat.views,
            self.noise,
        )

    def _read_sources(self) -> None:
        by_identity: dict[int, str] = {}
        names: dict[int, list[str]] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ):
            tensors[name] = tensor
            names.setdefault(id(tensor), []).append(name)
        positions = iter(i for i, leaf in enumerate(self.flat.leaves) if isinstance(leaf, torch.Tensor))
        nodes = {n.name: n for n in self.exported.graph.nodes if n.op == "placeholder"}
        for spec in self.exported.graph_signature.input_specs:
            if not isinstance(spec.arg, TensorArgument):
                continue
            node = spec.arg.name
            fake = nodes[node].meta["val"]
            if spec.kind is InputKind.USER_INPUT:
                position = next(positions)
                leaf = self.flat.leaves[position]
                self._source(node, "input", (self.flat.names[position],), fake, leaf.requires_grad)
                self.input_index[self.name_of[node]] = position
                continue
            assert spec.target is not None
            if spec.target not in tensors:
                constant = self.exported.constants[spec.target]
                if not isinstance(constant, torch.Tensor):
                    raise UnsupportedOperatorError(f"the model holds {spec.target!r}, a {type(constant).__name__}")
                if constant.requires_grad:
                    raise UnsupportedOperatorError(
                        f"the model reads {spec.target!r}, which requires a gradient but is no parameter, so that its "
                        "gradient would be lost; register it with nn.Parameter, or pass it as an argument"
                    )
                self._source(node, "constant", (spec.target,), fake, False)
                self.constants[self.name_of[node]] = constant
                continue
            tensor = tensors[spec.target]
            # Tied weights are one object under several names; the first name stands for all.
            if id(tensor) in by_identity:
                self.name_of[node] = by_identity[id(tensor)]
                continue
            kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
            self._source(node, kind, tuple(names[id(tensor)]), fake, tensor.requires_grad)
            by_identity[id(tensor)] = self.name_of[node]

    def _source(self, node: str, kind: str, names: tuple[str, ...], fake: torch.Tensor, grad: bool) -> None:
        name = names[0] if kind != "input" else self._free(node)
        value = _value(name, fake, grad)
        self.name_of[node] = name
        self.sources[name] = Source(value, kind, names, trainable=grad)
        self.graded.update([name] if grad else [])

    def _operators(self, node: torch.fx.Node) -> list[Operator]:
        if node.op != "call_function":
            return []
        if node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node):
            values = self.results_of.get(node.args[0].name)
            if values is not None:
                self.name_of[node.name] = values[node.args[1]].name  # type: ignore[index]
                return []
        source = source_line(node)
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise UnsupportedOperatorError(
                f"{source}: {getattr(target, '__name__', target)!r} is not an operator that can be placed; control "
                "flow inside the graph (torch.cond, while_loop, scan) has to be taken out of the model"
            )
        name = str(target)
        if name in _STATIC_CHECKS:
            return []
        if target._schema.is_mutable:
            raise UnsupportedOperatorError(f"{source}: {name} changes a tensor in place and has no functional form")
        results = self._results(node, source)
        positional, kwargs = _positional(node, target)
        args = positional
        if name in _NEW:  # reads a tensor's dtype and device only, so it must not wait for the tensor
            name, args = _NEW[name], args[1:]
            kwargs = {"dtype": getattr(torch, results[0].dtype), "device": torch.device("cpu")}
        made = Operator(
            name=self._free(node.name),
            target=_FREE_OF_STRIDES.get(name, name),
            args=tuple(self._argument(a) for a in args),
            kwargs={k: self._argument(v) for k, v in kwargs.items()},
            results=results,
            module_path=module_path(node),
            call_path=call_path(node),
            recompute=checkpoint_of(node),
            source_line=source,
            random=is_random(target, positional),
        )
        if (noise := noise_of(made, node, self.graded)) is not None:
            self.noise[results[0].name] = noise
            self.sources[results[0].name] = Source(results[0], "constant", (results[0].name,), trainable=False)
            return []
        if (found := layout_of_argument(node)) is not None:
            self.layouts[self.name_of[found[0]]] = found[1]
        if not self.graded.isdisjoint(made.operands) and not _WITHOUT_GRADIENT.match(name):
            self.graded.update(v.name for v in results if v.dtype.startswith(("float", "bfloat", "complex")))
        return rewrite(made, node, self.graded)

    def _results(self, node: torch.fx.Node, source: SourceLine | None) -> tuple[Value, ...]:
        fake = node.meta.get("val")
        if fake is None:
            return ()
        where = f"{source}: " if source is not None else ""
        made = [t for t in pytree.tree_leaves(fake) if isinstance(t, torch.Tensor)]
        if any(not isinstance(extent, int) for t in made for extent in t.shape):
            raise UnsupportedOperatorError(
                f"{where}the shape of what {node.target} gives depends on data, and a graph has one shape for all "
                "data; use torch.where or a mask instead of picking elements"
            )
        if isinstance(fake, torch.Tensor):
            self.name_of[node.name] = self._free(node.name)
            return (_value(self.name_of[node.name], fake, False),)
        if isinstance(fake, (tuple, list)):
            base = self._free(node.name)
            values = tuple(_value(f"{base}.{i}", t, False) for i, t in enumerate(fake) if t is not None)
            self.results_of[node.name] = values
            return values
        raise UnsupportedOperatorError(
            f"{where}{node.target} gives a {type(fake).__name__}, a number that depends on data; keep it a tensor"
        )

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            if argument.name not in self.name_of:
                raise TraceError(f"{argument.format_node()} is used as one value but makes several")
            return Ref(self.name_of[argument.name])
        if isinstance(argument, (list, tuple)):
            return tuple(self._argument(a) for a in argument)
        if isinstance(argument, slice):
            return slice(*(self._argument(a) for a in (argument.start, argument.stop, argument.step)))
        if isinstance(argument, torch.device):
            return Symbol("device", "")
        for kind, name in _SYMBOL_KINDS.items():
            if isinstance(argument, kind):
                return Symbol(name, str(argument).removeprefix("torch."))
        return argument

    def _read_outputs(self) -> tuple[tuple[Any, ...], tuple[tuple[str, str], ...]]:
        tensors: list[Ref] = []
        mutations: list[tuple[str, str]] = []
        inputs = {s.names[0]: s for s in self.sources.values() if s.kind == "input"}
        fakes = {node.name: node.meta.get("val") for node in self.exported.graph.nodes}
        for spec in self.exported.graph_signature.output_specs:
            name = self.name_of[spec.arg.name]
            if spec.kind is OutputKind.USER_OUTPUT:
                tensors.append(Ref(name))
                self.strides[name] = torch.empty_like(fakes[spec.arg.name]).stride()
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                mutations.append((self._name_of_target(spec.target), name))
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                mutated = self.name_of[str(spec.target)]
                if self.sources[mutated].trainable:
                    raise UnsupportedOperatorError(
                        f"the model changes its input {inputs and self.sources[mutated].names[0]!r} in place while it "
                        "requires a gradient; clone it first"
                    )
                mutations.append((mutated, name))
            else:
                raise UnsupportedOperatorError(
                    f"the model overwrites {spec.target!r} in its forward ({spec.kind.name.lower()}); gradients would "
                    "be wrong. For nn.Embedding(max_norm=…), normalise the weight outside the model instead"
                )
        given = iter(tensors)
        outputs = (next(given) if is_tensor else None for is_tensor in self.flat.is_tensor)
        return tuple(outputs), tuple(mutations)

    def _name_of_target(self, target: str | None) -> str:
        for source in self.sources.values():
            if target in source.names:
                return source.value.name
        raise TraceError(f"the model updates {target!r}, which is no buffer of it")


def _positional(node: torch.fx.Node, target: torch._ops.OpOverload) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with every one that may be positional made so, so that rules find it by its position."""
    kwargs = {k: v for k, v in node.kwargs.items() if k != "pin_memory"}
    schema = [a for a in target._schema.arguments if not a.kwarg_only]
    args = list(node.args)
    last = max((i for i, a in enumerate(schema) if a.name in kwargs), default=-1)
    for argument in schema[len(args) : last + 1]:
        args.append(kwargs.pop(argument.name, argument.default_value))
    return tuple(args), kwargs


def _warn_of_unknown(operators: Sequence[Operator]) -> None:
    """Name custom operators that nobody has told us the axes and the cost of."""
    unknown: dict[str, Operator] = {}
    for op in operators:
        if op.rule is None and op.target.split(".")[0] not in ("aten", "prims"):
            unknown.setdefault(op.target, op)
    for target, op in unknown.items():
        namespace, name, _ = target.split(".", 2)
        warn_user(
            f"no axis rule and no cost are known for the custom operator {namespace}::{name} (first: {op}); it is "
            "computed whole and its cost is guessed from its sizes. Tell graphpart more with "
            f'graphpart.register_rule("{namespace}::{name}", "... k, n k -> ... n", flops=...)'
        )


def _value(name: str, tensor: torch.Tensor, requires_grad: bool) -> Value:
    shape = tuple(int(n) for n in tensor.shape)
    return Value(name, shape, str(tensor.dtype).removeprefix("torch."), requires_grad)


def _drop_unused(
    operators: Sequence[Operator], outputs: tuple[Any, ...], mutations: Sequence[tuple[str, str]]
) -> list[Operator]:
    """Operators whose results reach an output or an update, or that have no result (checks on data)."""
    needed = {ref.name for ref in refs(outputs)} | {value for _, value in mutations}
    kept: list[Operator] = []
    for op in reversed(operators):
        if not op.results or any(v.name in needed for v in op.results):
            needed.update(op.operands)
            kept.append(op)
    return kept[::-1]
