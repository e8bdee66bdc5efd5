"""Which dimension of each input runs over samples: as a user says, or dimension 0 where that is the batch's size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from graphpart.errors import ArgumentError
from graphpart.ir.graph import Graph, Source


def sample_dims_of(
    inputs: Sequence[Source], wanted: Mapping[str, int | None], arguments: Mapping[str, str] | None = None
) -> dict[str, int]:
    """The sample dimension of each input that has one, by value name.

    Args:
        inputs: tensors of a call.
        wanted: per input name (``args[0]``, ``labels``), the dimension that runs over samples, or None if it has none.
            Inputs not named: dimension 0 where its extent is the batch size, which is the first extent but 1 that
            dimension 0 of an input has.
        arguments: what the model may be called with: the argument's own name by each name for it (``args[0]`` is
            ``input_ids``). One that this call has not is passed over.

    Raises:
        ArgumentError: if there is no such argument, or it has no such dimension.
    """
    arguments = arguments or {}
    wishes = {_own_name(name, arguments): dim for name, dim in wanted.items()}
    names = {s.names[0]: _own_name(s.names[0], arguments) for s in inputs}
    for name in wanted:
        if _own_name(name, arguments) not in names.values() and _head(name) not in arguments:
            known = ", ".join(map(repr, names))
            raise ArgumentError(f"sample_dims names {name!r}; the tensor inputs are {known}")
    extents = [s.value.shape[0] for s in inputs if s.value.shape and names[s.names[0]] not in wishes]
    batch = next((n for n in extents if n != 1), 1)
    found = {}
    for source in inputs:
        name, shape = source.names[0], source.value.shape
        dim = wishes.get(names[name], 0 if shape[:1] == (batch,) else None)
        if dim is None:
            continue
        if dim >= len(shape):
            legal = f"a number from 0 to {len(shape) - 1}, or None" if shape else "None"
            raise ArgumentError(f"sample_dims gives {name!r} dimension {dim}, but it is {list(shape)}; give {legal}")
        found[source.value.name] = dim
    return found


def wished_sample_dims(graph: Graph) -> dict[str, int | None]:
    """What was said of a graph's inputs, by name, if that is not what would be taken anyway."""
    if dict(graph.sample_dims) == sample_dims_of(graph.inputs, {}):
        return {}
    return {source.names[0]: graph.sample_dims.get(source.value.name) for source in graph.inputs}


def _own_name(name: str, arguments: Mapping[str, str]) -> str:
    """An input by the name of the argument that it is, or is a part of."""
    head = _head(name)
    return arguments.get(head, head) + name[len(head) :]


def _head(name: str) -> str:
    found = re.match(r"args\[\d+\]|\w+", name)
    return found[0] if found else name
