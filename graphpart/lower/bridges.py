"""The bridge rule: bring the region a consumer needs from the parts that hold it.

Consumers on a device need regions of a value. The parts that cover them are found; those that lie elsewhere are
sliced at the source (needs united first, so one transfer per part and destination) and sent; at the destination
the pieces are sliced, concatenated, or summed where they are partial.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from graphpart.errors import GraphpartError
from graphpart.ir.graph import Ref
from graphpart.ir.region import Region
from graphpart.lower.parts import Need, Node, Part


class Bridges:
    """Builds bridge nodes; ``emit`` receives each node and returns its index.

    Attributes:
        parts: every part by name; grows.
        arrived: parts that were sent, by (name, device): the part as the device has it.
    """

    def __init__(self, parts: dict[str, Part], emit: Callable[[Node], int]) -> None:
        self.parts = parts
        self.emit = emit

    def supply(self, holders: Sequence[Part], needs: Sequence[Need]) -> dict[Need, str]:
        """Meet every need of one value.

        Args:
            holders: the parts that exist, in summation order.
            needs: what consumers want, without repetition.

        Returns:
            Per need, the name of a part with just that region.
        """
        near = {part.device for part in holders}
        exact = {part.region: part for part in reversed(holders) if not part.partial}
        chosen = {need: _exact(exact, near, need) or _cover(holders, need) for need in needs}
        at_hand = self._send(chosen)
        sliced = self._slice(chosen, at_hand)
        return {need: self._join(need, [sliced[need.device, p.name, r] for p, r in chosen[need]]) for need in needs}

    def _send(self, chosen: dict[Need, list[tuple[Part, Region]]]) -> dict[tuple[int, str], Part]:
        """Per (device, holder), the part as that device can read it: the united need, sliced at the source."""
        united: dict[tuple[int, str], Region] = {}
        holder: dict[str, Part] = {}
        for need, pieces in chosen.items():
            for part, region in pieces:
                key = (need.device, part.name)
                united[key] = united[key] | region if key in united else region
                holder[part.name] = part
        found = {}
        for (device, name), region in united.items():
            part = holder[name]
            if part.device == device or part.origin == "input" or region == part.region:
                found[device, name] = part
            else:
                found[device, name] = self._cut(part, [region], part.device)[0]
        return found

    def _slice(
        self, chosen: dict[Need, list[tuple[Part, Region]]], at_hand: dict[tuple[int, str], Part]
    ) -> dict[tuple[int, str, Region], Part]:
        """The pieces that needs are joined from, cut on the device that reads them."""
        wanted: dict[tuple[int, str], dict[Region, None]] = {}
        for need, pieces in chosen.items():
            for part, region in pieces:
                wanted.setdefault((need.device, part.name), {})[region] = None
        found = {}
        for (device, name), regions in wanted.items():
            part = at_hand[device, name]
            cut = self._cut(part, list(regions), device)
            found.update({(device, name, region): piece for region, piece in zip(regions, cut, strict=True)})
        return found

    def _cut(self, part: Part, regions: Sequence[Region], device: int) -> list[Part]:
        """Parts of a part; the part itself where all of it is wanted, one split where the pieces tile it."""
        if part.origin == "input":
            return [self._part_of_input(part, region) for region in regions]
        rest = [region for region in regions if region != part.region]
        along = _split_dim(part.region, rest)
        made: dict[Region, Part] = {part.region: part}
        if along is not None:
            sizes = tuple(len(region.dims[along]) for region in rest)
            made.update(zip(rest, self._pieces(part, rest, device, "graphpart.split", (sizes, along)), strict=True))
        else:
            for region in rest:
                runs = tuple(dim.runs for dim in region.within(part.region).dims)
                (made[region],) = self._pieces(part, [region], device, "graphpart.slice", (runs,))
        return [made[region] for region in regions]

    def _pieces(
        self, part: Part, regions: Sequence[Region], device: int, target: str, args: tuple[object, ...]
    ) -> list[Part]:
        made = [replace(part, name=f"{part.name}{region}", region=region, device=device) for region in regions]
        return self._make(part.value, [part], made, target, (Ref(part.name), *args), device)

    def _part_of_input(self, part: Part, region: Region) -> Part:
        """The caller slices inputs: a view, at no cost."""
        if region == part.region:
            return part
        piece = replace(part, name=f"{part.name}{region}", region=region)
        return self.parts.setdefault(piece.name, piece)

    def _join(self, need: Need, pieces: Sequence[Part]) -> str:
        """One part from pieces: itself, their sum, or their concatenation."""
        if len(pieces) == 1:
            return pieces[0].name
        names = tuple(Ref(p.name) for p in pieces)
        first = pieces[0]
        suffix = f"@{need.device}"
        if first.partial:
            whole = replace(first, name=f"{first.value}.sum{need.region}{suffix}", partial=False, device=need.device)
            return self._make(first.value, pieces, [whole], "graphpart.sum", (names,), need.device)[0].name
        dim, order = _concat_order(need.region, [p.region for p in pieces])
        whole = replace(
            first, name=f"{first.value}.concat{need.region}{suffix}", region=need.region, device=need.device
        )
        return self._make(first.value, pieces, [whole], "graphpart.concat", (names, dim, order), need.device)[0].name

    def _make(
        self,
        value: str,
        read: Sequence[Part],
        made: Sequence[Part],
        target: str,
        args: tuple[object, ...],
        device: int,
    ) -> list[Part]:
        if all(p.name in self.parts for p in made):
            return [self.parts[p.name] for p in made]
        microbatches = {p.microbatch for p in read}
        microbatch = microbatches.pop() if len(microbatches) == 1 else None
        names = tuple(p.name for p in made)
        node = Node(value, target, args, {}, tuple(p.name for p in read), names, device, microbatch)
        index = self.emit(node)
        for part in made:
            self.parts[part.name] = replace(part, node=index, microbatch=microbatch, origin="segment")
        return [self.parts[name] for name in names]


def _exact(exact: Mapping[Region, Part], near: Collection[int], need: Need) -> list[tuple[Part, Region]] | None:
    """The one part that is what a need asks for, unless other parts lie nearer: the common case, found fast."""
    part = exact.get(need.region)
    if part is None or need.partial or (part.device != need.device and need.device in near):
        return None
    return [(part, need.region)]


def _cover(holders: Sequence[Part], need: Need) -> list[tuple[Part, Region]]:
    """Disjoint pieces of holders that make up a need; those on the same device first."""
    if need.partial:
        return [(p, p.region) for p in holders if p.name == need.partial]
    if holders[0].partial:
        return [(p, need.region) for p in holders]
    if not need.region:  # of a value without elements: anyone holds it
        return [(holders[0], need.region)]
    left = [need.region]
    pieces: dict[int, list[Region]] = {}
    near_first = sorted(range(len(holders)), key=lambda i: (holders[i].device != need.device, i))
    for i in near_first:
        rest: list[Region] = []
        for region in left:
            common = region & holders[i].region
            if common:
                pieces.setdefault(i, []).append(common)
                rest += region.minus(common)
            else:
                rest.append(region)
        left = rest
        if not left:
            break
    if left:
        raise GraphpartError(f"the tiles of {need.value!r} do not cover {left[0]}, which device {need.device} needs")
    return [(holders[i], region) for i in sorted(pieces) for region in pieces[i]]


def _split_dim(whole: Region, pieces: Sequence[Region]) -> int | None:
    """The dimension along which pieces, in order, tile the whole without a gap; None if they don't."""
    if len(pieces) < 2:
        return None
    differing = [i for i, dim in enumerate(whole.dims) if any(p.dims[i] != dim for p in pieces)]
    if len(differing) != 1:
        return None
    (dim,) = differing
    order = [index for p in pieces for index in p.dims[dim]]
    return dim if order == list(whole.dims[dim]) else None


def _concat_order(whole: Region, pieces: Sequence[Region]) -> tuple[int, tuple[int, ...] | None]:
    """Along which dimension pieces are joined, and the order of the joined indices where they interleave."""
    differing = [i for i, dim in enumerate(whole.dims) if any(p.dims[i] != dim for p in pieces)]
    if len(differing) != 1:
        raise GraphpartError(f"pieces {', '.join(map(str, pieces))} do not join along one dimension to {whole}")
    (dim,) = differing
    joined = [index for p in pieces for index in p.dims[dim]]
    if joined == sorted(joined):
        return dim, None
    position = {index: at for at, index in enumerate(joined)}
    return dim, tuple(position[index] for index in whole.dims[dim])
