"""How pieces of a region are put together: a tree of concatenations, each along one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphpart.ir.region import Intervals, Region


@dataclass(frozen=True, slots=True)
class Joint:
    """A region and what it is made of.

    Attributes:
        region: what it makes.
        piece: for a leaf, the piece that holds the region.
        members: what is concatenated; none for a leaf.
        dim: along which dimension.
        order: where the joined indices interleave, the position of each in the concatenation; None if they don't.
    """

    region: Region
    piece: Region | None = None
    members: tuple[Joint, ...] = ()
    dim: int = 0
    order: tuple[int, ...] | None = None


def plan_join(whole: Region, pieces: Sequence[Region]) -> Joint:
    """Plan the concatenations that make a region from disjoint pieces that cover it.

    One dimension after another is taken: along it the pieces' index sets are refined to atoms (sets that every
    piece takes or leaves whole), and the pieces of each atom are joined along the other dimensions. A grid of pieces
    needs no refinement; the dimension that needs the fewest slices is taken first.

    Args:
        whole: the region wanted.
        pieces: disjoint regions that cover it, in order of preference.
    """
    return _join(whole, [(piece, piece & whole) for piece in pieces])


def _join(whole: Region, pieces: Sequence[tuple[Region, Region]]) -> Joint:
    """``pieces`` are pairs (piece, its part inside ``whole``)."""
    if len(pieces) == 1:
        return Joint(whole, piece=pieces[0][0])
    differing = [i for i, dim in enumerate(whole.dims) if any(inside.dims[i] != dim for _, inside in pieces)]
    atoms_of = {i: _atoms([inside.dims[i] for _, inside in pieces]) for i in differing}
    dim = min(differing, key=lambda i: (sum(map(len, atoms_of[i].values())), i))
    members = []
    for atom, holders in atoms_of[dim].items():
        own = [(pieces[i][0], pieces[i][1].with_dim(dim, atom)) for i in holders]
        members.append(_join(whole.with_dim(dim, atom), own))
    runs = [run for member in members for run in member.region.dims[dim].runs]
    order = None
    if runs != sorted(runs):
        joined = [index for member in members for index in member.region.dims[dim].listed()]
        position = {index: at for at, index in enumerate(joined)}
        order = tuple(position[index] for index in whole.dims[dim])
    return Joint(whole, members=tuple(members), dim=dim, order=order)


def _atoms(sets: Sequence[Intervals]) -> dict[Intervals, list[int]]:
    """Disjoint sets such that each given set is a union of them, in order of first index; per such, who has it."""
    having: dict[Intervals, list[int]] = {}
    for i, given in enumerate(sets):
        having.setdefault(given, []).append(i)
    # No two overlap where together they are as many as their union.
    if sum(map(len, having)) == len(Intervals.of([run for given in having for run in given.runs])):
        return {atom: having[atom] for atom in sorted(filter(None, having), key=lambda atom: atom.runs)}
    atoms: list[Intervals] = []
    for new in having:
        left = new
        refined = []
        for atom in atoms:
            common = atom & left
            refined += [part for part in (common, atom - common) if part]
            left = left - common
        atoms = refined + ([left] if left else [])
    atoms.sort(key=lambda atom: atom.runs)
    return {atom: [i for i, given in enumerate(sets) if atom <= given] for atom in atoms}
