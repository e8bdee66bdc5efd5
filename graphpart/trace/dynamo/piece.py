"""A graph that TorchDynamo has cut out of a call, as a module that the tracer takes like any other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

_ROOT = re.compile(r"^[LG]\['\w+'\]")
_PART = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]|\[(\d+)\]|\.([\w@]+)")


@torch.library.custom_op("graphpart::loss", mutates_args=())
def mark_loss(loss: Tensor) -> Tensor:
    """The loss itself, under a name by which it is found in a graph."""
    return loss.clone()


@mark_loss.register_fake
def _(loss: Tensor) -> Tensor:
    return torch.empty_like(loss)


mark_loss.register_autograd(lambda _, gradient: gradient)

_MARK = torch.ops.graphpart.loss.default


@dataclass(frozen=True)
class Cut:
    """A graph with what stands for each of its inputs.

    Attributes:
        module: calls the graph with tensors by name; it holds the parameters and buffers under the model's own names.
            Its result is the graph's, behind the loss if that is marked in the graph.
        positions: per name of an argument, which input of the graph it is.
        has_loss: whether the loss is marked.
    """

    module: nn.Module
    positions: Mapping[str, int]
    has_loss: bool

    @property
    def stopped_at(self) -> str:
        """The operator at which tracing failed, by its name in the graph; empty if none did."""
        return str(self.module.__dict__.get("_stopped_at", ""))

    def arguments(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The module's arguments for some inputs of the graph."""
        return {name: inputs[i] for name, i in self.positions.items()}


def cut_out(
    graph: GraphModule,
    places: Sequence[str],
    owned: Sequence[str | None],
    inputs: Sequence[Any],
    name: str,
    training: bool,
) -> Cut:
    """A graph as a module.

    Args:
        graph: what TorchDynamo gives a backend.
        places: per input of the graph, where TorchDynamo found it.
        owned: per input of the graph, which parameter or buffer of the model it is.
        inputs: its inputs.
        name: what the module's class is called.
        training: the model's mode.
    """
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    positions: dict[str, int] = {}
    root = type(name, (_Cut,), {})()
    for i, (node, place, own, value) in enumerate(zip(placeholders, places, owned, inputs, strict=True)):
        if own is None:
            wanted = _written(place) or node.name
            positions[f"{wanted} ({i})" if wanted in positions else wanted] = i
        else:
            _put(root, own, value)
    _name_modules(graph, _prefix_of(places, owned))
    marks = [node for node in graph.graph.nodes if node.target is _MARK]
    hidden = root.__dict__
    hidden["_graph"], hidden["_owned"], hidden["_positions"] = graph, tuple(owned), positions
    hidden["_mark"] = marks[0].name if marks else None
    root.train(training)
    return Cut(root, positions, bool(marks))


def form_of(graph: GraphModule) -> tuple[Any, ...]:
    """What a graph computes: graphs of equal forms do the same to equal inputs, by the same tensors and objects."""
    found: list[Any] = []
    for path, inner in graph.named_modules():
        if not isinstance(inner, GraphModule):
            found.append((path, _Same(inner)))
            continue
        code = inner.graph.python_code("self")
        names = frozenset((name, _Same(value)) for name, value in code.globals.items())
        read = {str(node.target) for node in inner.graph.nodes if node.op == "get_attr"}
        values = {name: attrgetter(name)(inner) for name in sorted(read)}
        held = tuple((name, _Same(value)) for name, value in values.items() if not isinstance(value, GraphModule))
        found.append((path, code.src, names, held))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Same:
    """An object that equals itself alone, and is held, so that no later one is taken for it."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Cut(nn.Module):
    """Runs a graph node by node, so that what is traced keeps the modules and lines that the nodes come from."""

    def forward(self, **tensors: Any) -> Any:
        owned: Sequence[str | None] = self.__dict__["_owned"]
        names = {i: name for name, i in self.__dict__["_positions"].items()}
        inputs = [tensors[names[i]] if own is None else attrgetter(own)(self) for i, own in enumerate(owned)]
        with preserve_node_meta():
            runner = _Runner(self.__dict__["_graph"], self.__dict__["_mark"])
            try:
                results = runner.run(*inputs)
            except Exception:
                self.__dict__["_stopped_at"] = runner.at
                raise
        return results if runner.loss is None else (runner.loss, results)


class _Runner(Interpreter):
    """Runs a graph, knows where it is, and takes the marked loss for its operand."""

    def __init__(self, graph: GraphModule, mark: str | None) -> None:
        super().__init__(graph)
        self.mark = mark
        self.loss: Tensor | None = None
        self.at = ""
        self.extra_traceback = False  # an error says what is wrong, and where, by itself

    def run_node(self, n: Node) -> Any:
        self.at = n.name
        if n.name == self.mark:
            self.loss = self.env[n.args[0]]  # type: ignore[index]
            return self.loss
        return super().run_node(n)


def _put(root: nn.Module, path: str, tensor: Tensor) -> None:
    """Register a parameter or buffer under a dotted name."""
    *outer, name = path.split(".")
    for part in outer:
        if part not in root._modules:
            root._modules[part] = nn.Module()
        root = root._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        root._parameters[name] = tensor
    else:
        root._buffers[name] = tensor


def _written(place: str) -> str:
    """An argument of the call as one writes it: ``args[0]``, ``labels``; empty for other inputs."""
    found = re.fullmatch(r"L\['args'\](\[.*)", place)
    if found:
        return f"args{found[1]}"
    found = re.fullmatch(r"L\['kwargs'\]\['(\w+)'\](.*)", place)
    return f"{found[1]}{found[2]}" if found else ""


def _name_modules(graph: GraphModule, prefix: str) -> None:
    """Give operators the paths of their modules in the model, in place of TorchDynamo's, for :mod:`.origin` to read."""
    for inner in graph.modules():
        for node in inner.graph.nodes if isinstance(inner, GraphModule) else ():
            stack = node.meta.get("nn_module_stack")
            if stack:
                paths = {key: (_joined(prefix, _parts(path)), kind) for key, (path, kind) in stack.items()}
                node.meta["nn_module_stack"] = paths


def _prefix_of(places: Sequence[str], owned: Sequence[str | None]) -> str:
    """The path of the module whose method a graph was cut out of: what the model's names have before TorchDynamo's."""
    for place, own in zip(places, owned, strict=True):
        inner = _parts(place)
        if own is not None and inner and f".{own}".endswith(f".{inner}"):
            return own[: len(own) - len(inner)].rstrip(".")
    return ""


def _parts(place: str) -> str:
    """``layer.0.weight`` of ``L['self']._modules['layer']._modules['0']._parameters['weight']``."""
    return ".".join("".join(found) for found in _PART.findall(_ROOT.sub("", place)))


def _joined(*paths: str) -> str:
    return ".".join(filter(None, paths))
