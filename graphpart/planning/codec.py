"""Graphs and placements as plain data, fit for JSON, and back.

Fields at their defaults are left out, unknown keys are ignored when reading. Axis rules and source lines are kept once
each, in tables, since a model of equal blocks repeats them.

An argument is written as JSON has it where JSON has it: numbers, text, booleans, null, and a tuple as a list. What JSON
lacks is an object with one tag::

    {"ref": "linear"}              a value
    {"symbol": ["dtype", "bool"]}  a torch object
    {"slice": [0, null, 2]}        {"list": [1, 2]}     {"dict": [["key", 1]]}
    {"float": "-inf"}              {"complex": [0.0, 1.0]}      {"ellipsis": true}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphpart.errors import GraphError
from graphpart.ir.axes import AxisRule, OperandDim, Window
from graphpart.ir.graph import Graph, Operator, Ref, Source, SourceLine, Symbol, Value
from graphpart.ir.placement import Placement, Shard, Tile
from graphpart.ir.region import Intervals, Region
from graphpart.planning.reads import each, get, item, items

Data = dict[str, Any]
"""A JSON object."""

MAX_INDEX = 2**62


def graph_to_dict(graph: Graph) -> Data:
    """A graph as plain data; :func:`graph_from_dict` gives an equal graph.

    Raises:
        GraphError: if an argument is of a type that cannot be written.
    """
    rules, lines = _Table(), _Table()
    operators = [_operator_to_dict(op, rules, lines) for op in graph.operators]
    return {
        "name": graph.name,
        "sources": [_source_to_dict(source) for source in graph.sources],
        "rules": rules.rows,
        "lines": lines.rows,
        "operators": operators,
        "outputs": [encode(leaf) for leaf in graph.outputs],
        "mutations": [list(pair) for pair in graph.mutations],
        "sample_dims": dict(graph.sample_dims),
    }


def graph_from_dict(data: Mapping[str, Any]) -> Graph:
    """A graph from plain data.

    Raises:
        GraphError: if a key is missing or holds something else than it should, or if the graph is malformed.
    """
    rules = each(data, "rules", _rule_from_dict, Mapping)
    lines = each(data, "lines", _line_from_list, list)
    return Graph(
        name=get(data, "name", str, ""),
        sources=each(data, "sources", _source_from_dict, Mapping),
        operators=each(data, "operators", lambda row: _operator_from_dict(row, rules, lines), Mapping),
        outputs=tuple(decode(leaf) for leaf in get(data, "outputs", list)),
        mutations=each(data, "mutations", lambda pair: (item(pair[0], str), item(pair[1], str)), list),
        sample_dims={name: item(dim, int) for name, dim in get(data, "sample_dims", Mapping, {}).items()},
    )


def _line_from_list(row: list[Any]) -> SourceLine:
    return SourceLine(item(row[0], str), item(row[1], int), item(row[2], str) if len(row) > 2 else "")


def placement_to_dict(placement: Placement) -> Data:
    """A placement as plain data: per operator a device index where it is whole, else its tiles."""
    return (
        {
            "tiles": {
                name: tiles[0].device
                if len(tiles) == 1 and not tiles[0].axes and not tiles[0].reads
                else [_shortened({"device": t.device, "axes": _texts(t.axes), "reads": _texts(t.reads)}) for t in tiles]
                for name, tiles in placement.tiles.items()
            },
            "homes": dict(placement.homes),
        }
        | (
            {"shards": {n: [[s.device, list(map(str, s.region.dims))] for s in shards] for n, shards in cut.items()}}
            if (cut := placement.shards)
            else {}
        )
        | ({"recompute": dict(placement.recompute)} if placement.recompute else {})
    )


def placement_from_dict(data: Mapping[str, Any]) -> Placement:
    """A placement from plain data.

    Raises:
        GraphError: if a key is missing or holds something else than it should.
    """
    tiles = {}
    for name, row in get(data, "tiles", Mapping).items():
        try:
            cut = isinstance(row, list)
            tiles[name] = tuple(_tile_from_dict(tile) for tile in row) if cut else (Tile(item(row, int)),)
        except (GraphError, TypeError, ValueError) as error:
            raise GraphError(f"the tiles of {name!r} cannot be read: {error}") from error
    homes = get(data, "homes", Mapping, {})
    shards = {}
    for name, rows in get(data, "shards", Mapping, {}).items():
        try:
            shards[name] = tuple(
                Shard(item(device, int), Region(tuple(map(_intervals, dims)))) for device, dims in rows
            )
        except (GraphError, TypeError, ValueError) as error:
            raise GraphError(f"the parts of {name!r} cannot be read: {error}") from error
    again = get(data, "recompute", Mapping, {})
    if any(not cut for cut in (*tiles.values(), *shards.values())):
        raise GraphError("an operator or a parameter is cut into no parts")
    return Placement(
        tiles, {name: get(homes, name, int) for name in homes}, shards, {name: get(again, name, str) for name in again}
    )


def encode(argument: Any) -> Any:
    """A nested argument as plain data; see the module's docstring.

    Raises:
        GraphError: if its type cannot be written.
    """
    if argument is None or isinstance(argument, (bool, int, str)):
        return argument
    if isinstance(argument, float):
        return argument if math.isfinite(argument) else {"float": str(argument)}
    if isinstance(argument, tuple):
        return [encode(item) for item in argument]
    if isinstance(argument, Ref):
        return {"ref": argument.name}
    if isinstance(argument, Symbol):
        return {"symbol": [argument.kind, argument.name]}
    if isinstance(argument, slice):
        return {"slice": [encode(x) for x in (argument.start, argument.stop, argument.step)]}
    if isinstance(argument, list):
        return {"list": [encode(item) for item in argument]}
    if isinstance(argument, Mapping):
        return {"dict": [[encode(key), encode(item)] for key, item in argument.items()]}
    if isinstance(argument, complex):
        return {"complex": [encode(argument.real), encode(argument.imag)]}
    if argument is Ellipsis:
        return {"ellipsis": True}
    raise GraphError(f"an argument {argument!r} of type {type(argument).__name__} cannot be written to a file")


_DECODERS: Mapping[str, Callable[[Any], Any]] = {
    "ref": lambda name: Ref(item(name, str)),
    "symbol": lambda pair: Symbol(item(pair[0], str), item(pair[1], str)),
    "slice": lambda parts: slice(*(decode(x) for x in parts)),
    "list": lambda items: [decode(item) for item in items],
    "dict": lambda pairs: {decode(key): decode(item) for key, item in pairs},
    "complex": lambda parts: complex(*(decode(x) for x in parts)),
    "float": float,
    "ellipsis": lambda _: ...,
}


def decode(data: Any) -> Any:
    """A nested argument from plain data.

    Raises:
        GraphError: if a tag is unknown or its content makes no sense.
    """
    if isinstance(data, list):
        return tuple(decode(item) for item in data)
    if not isinstance(data, Mapping):
        return data
    tag = next((tag for tag in data if tag in _DECODERS), None)
    if tag is None:
        raise GraphError(f"the argument {json.dumps(data)[:80]} has none of the tags {', '.join(_DECODERS)}")
    try:
        return _DECODERS[tag](data[tag])
    except (TypeError, ValueError, IndexError) as error:
        raise GraphError(f"the argument {json.dumps(data)[:80]} cannot be read: {error}") from error


class _Table:
    """Rows, each kept once."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._index: dict[str, int] = {}

    def add(self, row: Any) -> int:
        index = self._index.setdefault(json.dumps(row), len(self.rows))
        if index == len(self.rows):
            self.rows.append(row)
        return index


def _value_to_dict(value: Value) -> Data:
    data = {"name": value.name, "shape": list(value.shape), "dtype": value.dtype}
    return data | ({"requires_grad": True} if value.requires_grad else {})


def _value_from_dict(data: Mapping[str, Any]) -> Value:
    shape = items(data, "shape", int)
    return Value(get(data, "name", str), shape, get(data, "dtype", str), get(data, "requires_grad", bool, False))


def _source_to_dict(source: Source) -> Data:
    data = {"value": _value_to_dict(source.value), "kind": source.kind, "names": list(source.names)}
    return data | ({"trainable": True} if source.trainable else {})


def _source_from_dict(data: Mapping[str, Any]) -> Source:
    return Source(
        value=_value_from_dict(get(data, "value", Mapping)),
        kind=get(data, "kind", str),
        names=items(data, "names", str),
        trainable=get(data, "trainable", bool, False),
    )


def _operator_to_dict(op: Operator, rules: _Table, lines: _Table) -> Data:
    try:
        args, kwargs = encode(op.args), {key: encode(item) for key, item in op.kwargs.items()}
    except GraphError as error:
        raise GraphError(f"operator {op}: {error}") from error
    source = op.source_line
    data = {
        "name": op.name,
        "target": op.target,
        "args": args,
        "kwargs": kwargs,
        "results": [_value_to_dict(value) for value in op.results],
        "rule": None if op.rule is None else rules.add(_rule_to_dict(op.rule)),
        "flops_forward": op.flops_forward,
        "flops_backward": op.flops_backward,
        "saved": list(op.saved),
        "saved_extra_bytes": op.saved_extra_bytes,
        "module_path": op.module_path,
        "line": None if source is None else lines.add([source.file, source.line, source.code]),
        "random": op.random,
        "note": op.note,
        "call_path": op.call_path,
        "recompute": op.recompute,
    }
    return {key: item for key, item in data.items() if item is not None and (key == "rule" or key == "line" or item)}


def _operator_from_dict(data: Mapping[str, Any], rules: Sequence[AxisRule], lines: Sequence[SourceLine]) -> Operator:
    rule, line = get(data, "rule", int, None), get(data, "line", int, None)
    return Operator(
        name=get(data, "name", str),
        target=get(data, "target", str),
        args=decode(get(data, "args", list, [])),
        kwargs={key: decode(item) for key, item in get(data, "kwargs", Mapping, {}).items()},
        results=each(data, "results", _value_from_dict, Mapping),
        rule=None if rule is None else _row(rules, rule),
        flops_forward=get(data, "flops_forward", float, 0.0),
        flops_backward=get(data, "flops_backward", float, 0.0),
        saved=items(data, "saved", str),
        saved_extra_bytes=get(data, "saved_extra_bytes", int, 0),
        module_path=get(data, "module_path", str, ""),
        source_line=None if line is None else _row(lines, line),
        random=get(data, "random", bool, False),
        note=get(data, "note", str, ""),
        call_path=get(data, "call_path", str, ""),
        recompute=get(data, "recompute", str, ""),
    )


def _row(rows: Sequence[Any], index: int) -> Any:
    if not 0 <= index < len(rows):
        raise GraphError(f"row {index} is named; there are {len(rows)}")
    return rows[index]


def _rule_to_dict(rule: AxisRule) -> Data:
    """Dimensions of one axis are written as its name, products as lists of names, windows as objects."""

    def one(dim: OperandDim) -> Any:
        if isinstance(dim, Window):
            return {"axis": dim.axis, "window": [dim.extent, dim.stride, dim.start, dim.size]}
        return dim[0] if len(dim) == 1 else list(dim)

    def written(tensors: Sequence[tuple[OperandDim, ...]]) -> list[list[Any]]:
        return [[one(dim) for dim in dims] for dims in tensors]

    return _shortened(
        {
            "extents": dict(rule.extents),
            "operands": written(rule.operands),
            "results": written(rule.results),
            "sums": sorted(rule.sums),
            "whole": sorted(rule.whole),
            "linear": [list(group) for group in rule.linear],
            "shape_argument": rule.shape_argument,
            "rewritten": sorted(rule.rewritten),
        }
    )


def _rule_from_dict(data: Mapping[str, Any]) -> AxisRule:
    def one(dim: Any) -> OperandDim:
        if isinstance(dim, Mapping):
            numbers = items(dim, "window", int)
            if len(numbers) != 4:
                raise GraphError(f"a window has 4 numbers, not {len(numbers)}")
            return Window(get(dim, "axis", str), *numbers)
        return (dim,) if isinstance(dim, str) else tuple(item(axis, str) for axis in item(dim, list))

    def read(key: str) -> tuple[tuple[Any, ...], ...]:
        return each(data, key, lambda dims: tuple(map(one, dims)), list)

    return AxisRule(
        extents={axis: item(extent, int) for axis, extent in get(data, "extents", Mapping, {}).items()},
        operands=read("operands"),
        results=read("results"),
        sums=frozenset(items(data, "sums", str)),
        whole=frozenset(items(data, "whole", str)),
        linear=each(data, "linear", lambda group: tuple(item(i, int) for i in group), list),
        shape_argument=get(data, "shape_argument", int, None),
        rewritten=frozenset(items(data, "rewritten", str)),
    )


def _texts(axes: Mapping[str, Intervals]) -> dict[str, str]:
    return {axis: str(part) for axis, part in axes.items()}


def _tile_from_dict(data: Mapping[str, Any]) -> Tile:
    axes, reads = (
        {axis: _intervals(text) for axis, text in get(data, key, Mapping, {}).items()} for key in ("axes", "reads")
    )
    return Tile(get(data, "device", int), axes, reads)


def _intervals(text: str) -> Intervals:
    """The index set that ``Intervals.__str__`` wrote: ``0:64,70``, or ``∅``."""
    runs = []
    item(text, str)
    for part in text.split(",") if text not in ("", "∅") else ():
        start, _, stop = part.partition(":")
        runs.append((int(start), int(stop) if stop else int(start) + 1))
        if not 0 <= runs[-1][0] < runs[-1][1] <= MAX_INDEX:
            raise GraphError(f"{part[:40]!r} is no run of indices")
    return Intervals.of(runs)


def _shortened(data: Data) -> Data:
    """Without entries that say nothing."""
    return {key: item for key, item in data.items() if item is not None and item not in ([], {}, "")}
