"""The parts of a value that exist, looked up by what is needed of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from graphpart.ir.region import Intervals, Region
from graphpart.lower.parts import Need, Part
from graphpart.lower.rounds import by_region


class Holders:
    """The parts of one value; each look-up takes time for what it finds, not for all of them.

    Attributes:
        parts: in summation order.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._exact = {part.region: part for part in reversed(parts) if not part.term}
        self._held = by_region(parts)
        self._devices = {part.device for part in parts}
        self._terms = tuple(dict.fromkeys([part.term for part in parts]))
        self._are_apart = bool(self._held) and self._terms == ((),)  # parts of unlike regions, that is
        self._exact_on = {(part.region, part.device): part for part in reversed(parts)} if self._are_apart else {}
        self._relevant: dict[Region, Sequence[Part]] = {}

    def exact(self, need: Need) -> Part | None:
        """The part that is just what is needed, if none that has something of it is nearer."""
        part = self._exact.get(need.region)
        if part is not None and self._are_apart and not need.part:
            return self._exact_on.get((need.region, need.device), part)
        is_nearest = part is not None and (part.device == need.device or need.device not in self._devices)
        return part if is_nearest else None

    def relevant(self, need: Need) -> Sequence[Part]:
        """The parts that may have something of what is needed, in summation order; all terms are among them."""
        if need.part:
            return self._named[need.part]
        found = self._relevant.get(need.region)
        if found is None:  # parts of other regions have nothing of this one, where all are apart
            found = self._held.get(need.region) or self._touching(need.region)
            self._relevant[need.region] = found
        return found

    def _touching(self, region: Region) -> Sequence[Part]:
        if not region or not region.dims:
            return self.parts
        numbers: set[int] | None = None
        for dim, having in zip(region.dims, self._by_dim, strict=True):
            here = {number for part, own in having.items() if part & dim for number in own}
            numbers = here if numbers is None else numbers & here
        found = [self.parts[number] for number in sorted(numbers or ())]
        return found if tuple(dict.fromkeys([part.term for part in found])) == self._terms else self.parts

    @cached_property
    def _by_dim(self) -> list[dict[Intervals, list[int]]]:
        """Per dimension, the numbers of the parts that have each set of its indices."""
        found: list[dict[Intervals, list[int]]] = [{} for _ in self.parts[0].region.dims]
        for number, part in enumerate(self.parts):
            for dim, having in zip(part.region.dims, found, strict=True):
                having.setdefault(dim, []).append(number)
        return found

    @cached_property
    def _named(self) -> dict[str, list[Part]]:
        found: dict[str, list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.name, []).append(part)
        return found
