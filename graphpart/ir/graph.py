"""The traced model: operators in topological order, joined by named values. No torch needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from graphpart.errors import GraphError
from graphpart.ir.axes import AxisRule

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ref:
    """A value used as an operator's argument, by name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Symbol:
    """A torch object used as an argument, by kind and name: ``Symbol("dtype", "float32")``.

    Attributes:
        kind: ``dtype``, ``layout``, ``memory_format`` or ``device``; a ``device`` always means the device
            on which the operator runs.
        name: its name without the ``torch.`` prefix.
    """

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class SourceLine:
    """Where in the user's code an operator comes from."""

    file: str
    line: int
    code: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" ({self.code})" if self.code else "")


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in the graph.

    Attributes:
        name: unique in the graph.
        shape: whole shape.
        dtype: name without the ``torch.`` prefix.
        requires_grad: whether a gradient can flow back through it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Source:
    """A value that exists before the graph runs.

    Attributes:
        value: the tensor.
        kind: ``parameter``, ``buffer``, ``constant`` or ``input``.
        names: the model's names for it; several where weights are tied. For an input, its path in the
            call, such as ``args[0]`` or ``labels``.
        trainable: for a parameter, whether its gradient is wanted.
    """

    value: Value
    kind: str
    names: tuple[str, ...]
    trainable: bool = False


@dataclass(frozen=True)
class Operator:
    """One operator of the traced model.

    Attributes:
        name: unique in the graph; a single result has the same name, several are ``name.0``, ``name.1``…
        target: what it computes, such as ``aten.linear.default``.
        args: positional arguments; tensors are :class:`Ref`, torch objects are :class:`Symbol`.
        kwargs: keyword arguments, likewise.
        results: the values it makes.
        rule: its axis rule, or None if it can only be computed whole.
        flops_forward: floating-point operations of one forward pass.
        flops_backward: floating-point operations of its gradients.
        saved: names of operands and results that its backward keeps.
        saved_extra_bytes: bytes its backward keeps besides those.
        module_path: the module that called it, such as ``transformer.h.0.attn``.
        source_line: the user's, where it is known.
        random: whether it draws random numbers.
        note: why it has no rule, or what a user should know.
        call_path: the module path with the number of the call behind each module that was called before, such as
            ``layer@2.attn@2``; empty if none was.
        recompute: the user's call of ``checkpoint`` that it is part of; empty for none.
        stands_for: where lowering made it to compute a part of a traced operator, that one's name; else empty.
    """

    name: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[Value, ...] = ()
    rule: AxisRule | None = None
    flops_forward: float = 0.0
    flops_backward: float = 0.0
    saved: tuple[str, ...] = ()
    saved_extra_bytes: int = 0
    module_path: str = ""
    source_line: SourceLine | None = None
    random: bool = False
    note: str = ""
    call_path: str = ""
    recompute: str = ""
    stands_for: str = ""

    @property
    def origin(self) -> str:
        """The traced operator that it comes from, by name: itself, unless lowering made it."""
        return self.stands_for or self.name

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the tensors it reads, in order of appearance, repeated where used twice."""
        return tuple(ref.name for ref in refs((self.args, dict(self.kwargs))))

    def __str__(self) -> str:
        where = f" in {self.module_path}" if self.module_path else ""
        line = f" at {self.source_line}" if self.source_line else ""
        return f"{self.name} ({self.target}{where}{line})"


def refs(arguments: Any) -> Iterator[Ref]:
    """Every :class:`Ref` in nested arguments, in order."""
    found: list[Ref] = []
    _collect_refs(arguments, found)
    return iter(found)


def _collect_refs(arguments: Any, found: list[Ref]) -> None:
    if isinstance(arguments, Ref):
        found.append(arguments)
    elif isinstance(arguments, (tuple, list)):
        for item in arguments:
            if not isinstance(item, _LITERALS):
                _collect_refs(item, found)
    elif isinstance(arguments, Mapping):
        for item in arguments.values():
            _collect_refs(item, found)
    elif isinstance(arguments, slice):
        _collect_refs((arguments.start, arguments.stop, arguments.step), found)


_LITERALS = (int, float, str)


def map_refs(arguments: Any, change: Callable[[Ref], Any]) -> Any:
    """Nested arguments with every :class:`Ref` replaced."""
    if isinstance(arguments, Ref):
        return change(arguments)
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(map_refs(item, change) for item in arguments)
    if isinstance(arguments, Mapping):
        return {key: map_refs(item, change) for key, item in arguments.items()}
    if isinstance(arguments, slice):
        return slice(*(map_refs(x, change) for x in (arguments.start, arguments.stop, arguments.step)))
    return arguments


@dataclass(frozen=True)
class Graph:
    """A model as a dataflow graph: functional, in topological order, edges by name.

    Attributes:
        name: the model's class name.
        sources: parameters, buffers, constants and inputs.
        operators: in topological order.
        outputs: what the model returns, flattened: a :class:`Ref` per tensor, other leaves as they are.
        mutations: pairs (source, value): the source is overwritten with the value at the step's end.
        sample_dims: per input that carries samples, the dimension that does.
    """

    name: str
    sources: tuple[Source, ...]
    operators: tuple[Operator, ...]
    outputs: tuple[Any, ...]
    mutations: tuple[tuple[str, str], ...] = ()
    sample_dims: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: set[str] = set()
        for source in self.sources:
            if source.value.name in known:
                raise GraphError(f"two sources are called {source.value.name!r}")
            known.add(source.value.name)
        for operator in self.operators:
            for name in operator.operands:
                if name not in known:
                    raise GraphError(f"operator {operator} reads {name!r}, which nothing before it makes")
            for value in operator.results:
                if value.name in known:
                    raise GraphError(f"operator {operator} makes {value.name!r}, which already exists")
                known.add(value.name)
        for ref in refs(self.outputs):
            if ref.name not in known:
                raise GraphError(f"the output {ref.name!r} is made by no operator")
        for source_name, value_name in self.mutations:
            if source_name not in known or value_name not in known:
                raise GraphError(f"the update of {source_name!r} with {value_name!r} names an unknown value")

    @cached_property
    def values(self) -> Mapping[str, Value]:
        """Every value by name."""
        found = {s.value.name: s.value for s in self.sources}
        found.update((v.name, v) for op in self.operators for v in op.results)
        return found

    @cached_property
    def producer(self) -> Mapping[str, Operator]:
        """The operator that makes each value; sources are absent."""
        return {v.name: op for op in self.operators for v in op.results}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Operator, ...]]:
        """The operators that read each value, in topological order."""
        found: dict[str, list[Operator]] = {name: [] for name in self.values}
        for op in self.operators:
            for name in dict.fromkeys(op.operands):
                found[name].append(op)
        return {name: tuple(ops) for name, ops in found.items()}

    @cached_property
    def operator(self) -> Mapping[str, Operator]:
        """Every operator by name."""
        return {op.name: op for op in self.operators}

    @cached_property
    def unsourced(self) -> frozenset[str]:
        """Operators made from no source, and not random, by name: masks, position numbers, filled tensors.

        They are cheap, deterministic and stateless, so they are computed wherever they are read, and never sent.
        """
        found: set[str] = set()
        for op in self.operators:
            makers = [self.producer.get(name) for name in op.operands]
            if op.results and not op.random and all(maker is not None and maker.name in found for maker in makers):
                found.add(op.name)
        return frozenset(found)

    def origin(self, name: str) -> str | None:
        """The traced operator that an operator, or the maker of a value, comes from; None for a source."""
        op = self.producer.get(name) or self.operator.get(name)
        return op.origin if op is not None else None

    @cached_property
    def source(self) -> Mapping[str, Source]:
        """Every source by its value's name."""
        return {s.value.name: s for s in self.sources}

    @property
    def parameters(self) -> tuple[Source, ...]:
        """Its parameters."""
        return tuple(s for s in self.sources if s.kind == "parameter")

    @property
    def inputs(self) -> tuple[Source, ...]:
        """Its inputs."""
        return tuple(s for s in self.sources if s.kind == "input")

    @property
    def num_parameters(self) -> int:
        """Number of parameter elements, tied weights once."""
        return sum(s.value.num_elements for s in self.parameters)

    @property
    def flops(self) -> float:
        """Floating-point operations of one forward and backward pass."""
        return sum(op.flops_forward + op.flops_backward for op in self.operators)
