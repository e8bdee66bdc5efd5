"""The bridge rule: bring the region a consumer needs from the parts that hold it.

Consumers on a device need regions of a value. The parts that cover them are found; those that lie elsewhere are
sliced at the source (needs united first, so one transfer per part and destination) and sent; at the destination
the pieces are sliced, summed where they are partial, and concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from graphpart.errors import GraphpartError
from graphpart.ir.graph import Ref, Symbol
from graphpart.ir.region import Intervals, Region
from graphpart.lower.collectives import Transfer, Transfers, apart
from graphpart.lower.holders import Holders
from graphpart.lower.join import Joint, plan_join
from graphpart.lower.parts import Need, Node, Part
from graphpart.lower.rounds import Rounds, in_rounds


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of a need, and the parts that add up to it (one, unless they are partial)."""

    region: Region
    addends: tuple[Part, ...] = ()


class Bridges:
    """Builds bridge nodes; ``emit`` receives each node and returns its index.

    Attributes:
        parts: every part by name; grows.
        wire_dtype: per value that is cast between devices, the type it crosses in.
        wide: per value whose partial results are wider than it, its own type.
        exchanges: the messages of each value, as they will be.
    """

    def __init__(
        self,
        parts: dict[str, Part],
        emit: Callable[[Node], int],
        wire_dtype: Mapping[str, str] | None = None,
        wide: Mapping[str, str] | None = None,
    ) -> None:
        self.parts = parts
        self.emit = emit
        self.wire_dtype = wire_dtype or {}
        self.wide = {} if wide is None else wide
        self.exchanges: list[Transfers] = []

    def supply(self, holders: Sequence[Part], needs: Sequence[Need]) -> dict[Need, str]:
        """Meet every need of one value.

        Args:
            holders: the parts that exist, in summation order.
            needs: what consumers want, without repetition.

        Returns:
            Per need, the name of a part with just that region.
        """
        met: dict[Need, str] = {}
        for rounds in in_rounds(holders, needs, SMALLEST_IN_ROUNDS):
            shared, found = self._meet_in_rounds(rounds)
            met.update(found)
            gone = {part.name for part in rounds.holders} if rounds.shares else frozenset()
            holders = [*(part for part in holders if part.name not in gone), *(shared if gone else ())]
        rest = [need for need in needs if need not in met]
        return {**met, **self._meet_at_once(holders, rest)} if rest else met

    def _meet_in_rounds(self, rounds: Rounds) -> tuple[list[Part], dict[Need, str]]:
        """What holders have after they added up their shares, and the parts that meet the needs."""
        own = list(rounds.holders)
        if rounds.shares:
            own = self._bring(own, rounds.shares)
        devices = {part.device for part in rounds.holders}
        here = [need for need in rounds.needs if need.device in devices]
        there = [need for need in rounds.needs if need.device not in devices]
        met = self._meet_at_once(own, here) if here else {}
        if there and rounds.relays and rounds.shares:
            met.update(self._meet_at_once(self._bring(own, rounds.relays), there))
        elif there and rounds.relays:  # each replica sends its share of them
            brought = [part for i, n in enumerate(rounds.relays) for part in self._bring([own[i % len(own)]], [n])]
            met.update(self._meet_at_once(brought, there))
        elif there:
            met.update(self._meet_at_once(own, there))
        return own, met

    def _bring(self, holders: Sequence[Part], needs: Sequence[Need]) -> list[Part]:
        met = self._meet_at_once(holders, needs)
        return [self.parts[met[need]] for need in needs]

    def _meet_at_once(self, holders: Sequence[Part], needs: Sequence[Need]) -> dict[Need, str]:
        """Meet needs by one message from each holder that has something of them."""
        held = Holders(holders)
        chosen: dict[Need, list[Piece]] = {}
        for need in needs:
            part = held.exact(need)  # the common case, found fast
            chosen[need] = [Piece(need.region, (part,))] if part is not None else _cover(held.relevant(need), need)
        at_hand = self._send(chosen)
        self._note(chosen, at_hand)
        sliced = self._slice(chosen, at_hand)
        return {need: self._meet(need, pieces, sliced) for need, pieces in chosen.items()}

    def bring(self, name: str, device: int) -> str:
        """The name of a part as a device has it, which may only come to have it by reading it."""
        part = self.parts[name]
        if part.device == device or part.origin == "input":
            return name
        runs = tuple(dim.runs for dim in part.region.within(part.region).dims)
        return self._pieces(part, [part.region], device, "graphpart.slice", (runs,))[0].name

    def _send(self, chosen: Mapping[Need, Sequence[Piece]]) -> dict[tuple[int, str], Part]:
        """Per (device, holder), the part as that device can read it: the united need, sliced and cast at the source."""
        united: dict[tuple[int, str], Region] = {}
        for need, pieces in chosen.items():
            for piece in pieces:
                for part in piece.addends:
                    key = (need.device, part.name)
                    united[key] = united[key] | piece.region if key in united else piece.region
        found = {}
        for (device, name), region in united.items():
            part = self.parts[name]
            if part.device == device or part.origin == "input" or region == part.region:
                found[device, name] = part
            else:
                found[device, name] = self._cut(part, [region], part.device)[0]
            if part.device != device and part.value in self.wire_dtype:
                found[device, name] = self._cast(found[device, name], self.wire_dtype[part.value], part.device)
        return found

    def _cast(self, part: Part, dtype: str, device: int) -> Part:
        name = f"{part.name}.{dtype}" + ("" if device == part.device else f"@{device}")
        made = replace(part, name=name, dtype=dtype, device=device)
        args = (Ref(part.name), Symbol("dtype", dtype))
        return self._make(part.value, [part], [made], "graphpart.cast", args, device)[0]

    def _note(self, chosen: Mapping[Need, Sequence[Piece]], at_hand: Mapping[tuple[int, str], Part]) -> None:
        """Keep who sends what to whom, by microbatch."""
        found: dict[int | None, dict[Transfer, None]] = {}
        for need, pieces in chosen.items():
            for piece in pieces:
                for holder in piece.addends:
                    part = at_hand[need.device, holder.name]
                    if part.device != need.device and part.origin != "input":
                        is_whole = part.region == holder.region
                        transfer = Transfer(part.name, part.device, need.device, len(piece.addends) > 1, is_whole)
                        found.setdefault(holder.microbatch, {})[transfer] = None
        for microbatch, transfers in found.items():
            value = self.parts[next(iter(transfers)).wire].value
            for together in apart(list(transfers)):
                self.exchanges.append(Transfers(value, microbatch, together))

    def _slice(
        self, chosen: Mapping[Need, Sequence[Piece]], at_hand: Mapping[tuple[int, str], Part]
    ) -> dict[tuple[int, str, Region], Part]:
        """The pieces that needs are made from, cut on the device that reads them."""
        wanted: dict[tuple[int, str], dict[Region, None]] = {}
        for need, pieces in chosen.items():
            for piece in pieces:
                for part in piece.addends:
                    wanted.setdefault((need.device, part.name), {})[piece.region] = None
        found = {}
        for (device, name), regions in wanted.items():
            part, dtype = at_hand[device, name], self.parts[name].dtype
            if part.dtype != dtype:
                part = self._cast(part, dtype, device)
            cut = [part] if list(regions) == [part.region] else self._cut(part, list(regions), device)
            found.update({(device, name, region): part for region, part in zip(regions, cut, strict=True)})
        return found

    def _cut(self, part: Part, regions: Sequence[Region], device: int) -> list[Part]:
        """Parts of a part; the part itself where all of it is wanted, one split where the pieces tile it."""
        if part.origin == "input":
            return [self._part_of_input(part, region) for region in regions]
        made = {part.region: part}
        for region in regions:
            if region not in made and (name := _piece_name(part, region, device)) in self.parts:
                made[region] = self.parts[name]
        rest = [region for region in regions if region not in made]
        along = _split_dim(part.region, rest)
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
        made = [
            replace(part, name=_piece_name(part, region, device), region=region, device=device) for region in regions
        ]
        return self._make(part.value, [part], made, target, (Ref(part.name), *args), device)

    def _part_of_input(self, part: Part, region: Region) -> Part:
        """The caller slices inputs: a view, at no cost."""
        if region == part.region:
            return part
        piece = replace(part, name=f"{part.name}{region}", region=region)
        return self.parts.setdefault(piece.name, piece)

    def _meet(self, need: Need, pieces: Sequence[Piece], sliced: Mapping[tuple[int, str, Region], Part]) -> str:
        """One part from pieces: each summed from its addends, then all concatenated."""
        summed = {}
        for piece in pieces:
            addends = [sliced[need.device, part.name, piece.region] for part in piece.addends]
            summed[piece.region] = addends[0] if len(addends) == 1 else self._sum(need, addends)
        if need.region in summed:
            return summed[need.region].name
        return self._join(need, plan_join(need.region, list(summed)), summed).name

    def _sum(self, need: Need, addends: Sequence[Part]) -> Part:
        first = addends[0]
        name = f"{first.value}.sum{first.region}@{need.device}"
        dtype = self.wide.get(first.value, first.dtype)
        whole = replace(first, name=name, term=(), device=need.device, dtype=dtype)
        names = tuple(Ref(p.name) for p in addends)
        args = (names,) if dtype == first.dtype else (names, Symbol("dtype", dtype))
        return self._make(first.value, addends, [whole], "graphpart.sum", args, need.device)[0]

    def _join(self, need: Need, joint: Joint, pieces: Mapping[Region, Part]) -> Part:
        """Follow a plan of concatenations; a leaf is a piece, or a slice of one."""
        if joint.piece is not None:
            piece = pieces[joint.piece]
            return piece if joint.region == joint.piece else self._cut(piece, [joint.region], need.device)[0]
        parts = [self._join(need, member, pieces) for member in joint.members]
        first = parts[0]
        name = f"{first.value}.concat{joint.region}@{need.device}"
        whole = replace(first, name=name, region=joint.region, device=need.device)
        names = tuple(Ref(p.name) for p in parts)
        args = (names, joint.dim, joint.order)
        return self._make(first.value, parts, [whole], "graphpart.concat", args, need.device)[0]

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


def _piece_name(part: Part, region: Region, device: int) -> str:
    """What a slice of a part is called; one that is cut where it was sent says so."""
    return f"{part.name}{region}" + ("" if device == part.device else f"@{device}")


SMALLEST_IN_ROUNDS = 1 << 14
"""Elements from which a value is worth several rounds of messages in place of one."""


def _cover(holders: Sequence[Part], need: Need) -> list[Piece]:
    """Disjoint pieces that make up a need, each with one addend of every term; those on the same device first.

    What some holder has of the value itself needs no terms.
    """
    if need.part:
        return [Piece(p.region, (p,)) for p in holders if p.name == need.part]
    terms = dict.fromkeys(part.term for part in holders)
    if () in terms and len(terms) > 1:
        found, left = _cover_some([part for part in holders if not part.term], need.region, need)
        partial = [part for part in holders if part.term]
        whole = [Piece(region, (part,)) for part, region in found]
        return whole + [piece for region in left for piece in _cover(partial, replace(need, region=region))]
    pieces = [Piece(need.region)]
    for term in terms:
        own = [part for part in holders if part.term == term]
        pieces = [
            Piece(region, (*piece.addends, part))
            for piece in pieces
            for part, region in _cover_all(own, piece.region, need)
        ]
    return pieces


def _cover_all(holders: Sequence[Part], wanted: Region, need: Need) -> list[tuple[Part, Region]]:
    """Disjoint regions of some of the holders that make up a region, in the holders' order."""
    found, left = _cover_some(holders, wanted, need)
    if left:
        raise GraphpartError(f"the tiles of {need.value!r} do not cover {left[0]}, which device {need.device} needs")
    return found


def _cover_some(
    holders: Sequence[Part], wanted: Region, need: Need
) -> tuple[list[tuple[Part, Region]], Sequence[Region]]:
    """Disjoint regions of some of the holders that make up what they have of a region, and what they have not."""
    if not wanted:  # of a value without elements: anyone holds it
        return [(holders[0], wanted)], ()
    near_first = sorted(range(len(holders)), key=lambda i: holders[i].device != need.device)
    if holders[near_first[0]].region == wanted:
        return [(holders[near_first[0]], wanted)], ()
    left = [wanted]
    pieces: dict[int, list[Region]] = {}
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
    return [(holders[i], region) for i in sorted(pieces) for region in pieces[i]], left


def _split_dim(whole: Region, pieces: Sequence[Region]) -> int | None:
    """The dimension along which pieces, in order, tile the whole without a gap; None if they don't."""
    if len(pieces) < 2:
        return None
    differing = [i for i, dim in enumerate(whole.dims) if any(p.dims[i] != dim for p in pieces)]
    if len(differing) != 1:
        return None
    (dim,) = differing
    runs = [run for p in pieces for run in p.dims[dim].runs]
    in_order = all(one[1] <= other[0] for one, other in pairwise(runs))
    return dim if in_order and Intervals.of(runs) == whole.dims[dim] else None
