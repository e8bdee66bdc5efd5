"""Values that go in rounds where several devices hold them and several need them, so that no link carries them all.

Devices that each hold a term of a sum take a share of it to add up, and give that to the others (reduce-scatter, then
all-gather: Thakur, Rabenseifner, Gropp 2005). From one group of devices to another, each reader takes in a share of its
own and gives it to its neighbours (the scatter and gather of Narayanan et al., SC 2021, section 4.1): the value crosses
between the groups once, in parts, where it would cross once for each reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from graphpart.ir.region import Intervals, Region
from graphpart.lower.parts import Need, Part


@dataclass(frozen=True)
class Rounds:
    """Needs of one region that are met in rounds.

    Attributes:
        holders: what there is of it: its terms, or replicas.
        needs: on which devices it is wanted.
        shares: what each holder adds up first; none where they are replicas.
        relays: what each reader that has nothing of it takes in first; none where they are few.
    """

    holders: tuple[Part, ...]
    needs: tuple[Need, ...]
    shares: tuple[Need, ...]
    relays: tuple[Need, ...]


def in_rounds(holders: Sequence[Part], needs: Sequence[Need], smallest: int) -> list[Rounds]:
    """The needs of one value that are better met in rounds.

    Args:
        holders: the parts of it that exist, in summation order.
        needs: what is wanted of it.
        smallest: elements of a region from which rounds are worth their messages.
    """
    wanted: dict[Region, list[Need]] = {}
    for need in needs:
        if not need.part and need.region.num_elements >= smallest:
            wanted.setdefault(need.region, []).append(need)
    if not any(len(found) > 1 for found in wanted.values()):
        return []
    held = by_region(holders)
    several = [region for region in wanted if len(wanted[region]) > 1 and len(held.get(region, ())) > 1]
    found = [_rounds(held[region], wanted[region]) for region in several]
    return [rounds for rounds in found if rounds is not None]


def by_region(holders: Sequence[Part]) -> dict[Region, list[Part]]:
    """The parts of each region; none where parts of some regions overlap others, and it may take several of them."""
    held: dict[Region, list[Part]] = {}
    for part in holders:
        held.setdefault(part.region, []).append(part)
    return held if sum(region.num_elements for region in held) == reduce(or_, held).num_elements else {}


def _rounds(holders: Sequence[Part], needs: Sequence[Need]) -> Rounds | None:
    region, devices = holders[0].region, [part.device for part in holders]
    terms = {part.term for part in holders}
    readers = [need.device for need in needs]
    there = [device for device in readers if device not in devices]
    if len(set(devices)) < len(devices) or any(part.microbatch != holders[0].microbatch for part in holders):
        return None
    is_sum = len(terms) == len(holders) and () not in terms
    if not is_sum and terms != {()}:
        return None
    relays = _cut(holders[0].value, region, there) if len(there) > 1 else ()
    is_wanted_by_all = set(devices) <= set(readers) and len(devices) > 2
    shares = _cut(holders[0].value, region, devices) if is_sum and (relays or is_wanted_by_all) else ()
    if not (shares or relays) or (is_sum and not shares):
        return None
    return Rounds(tuple(holders), tuple(needs), shares, relays)


def _cut(value: str, region: Region, devices: Sequence[int]) -> tuple[Need, ...]:
    """A share of a region for each device, along its longest dimension; none if that is too short."""
    extents = region.shape
    longest = max(extents, default=0)
    if longest < len(devices):
        return ()
    dim, num_devices = extents.index(longest), len(devices)
    bounds = [i * longest // num_devices for i in range(num_devices + 1)]
    parts = [region.dims[dim].at(Intervals.span(bounds[i], bounds[i + 1])) for i in range(num_devices)]
    return tuple(Need(value, region.with_dim(dim, part), device) for part, device in zip(parts, devices, strict=True))
