"""How many microbatches the devices of a chain hold under each schedule: known before there is a program."""

from __future__ import annotations

from collections.abc import Sequence

from graphpart.order.asynchronous import Async
from graphpart.order.interleaved import most_begun


def held_on_chain(
    choice: str | Async, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> tuple[float, ...]:
    """Per stage, of how many microbatches its device keeps activations at once, while messages take no time.

    It is what the caps of the schedules come to on a chain of stages that are given out in rounds over the devices.
    With several rounds, a microbatch of which a device has begun only some of its stages counts as a part of one.
    ``auto`` takes the thriftiest schedule where memory is short, so it counts as ``1f1b``; and so does ``zero-bubble``,
    whose late gradients of weights come on top.

    Args:
        choice: a schedule by name, ``auto``, ``async`` or an :class:`Async`.
        num_stages: stages of the chain.
        num_microbatches: parts of the batch.
        num_chunks: rounds.
    """
    num_devices = -(-num_stages // num_chunks)
    found = _caps(choice, num_devices, num_chunks, num_microbatches)
    return tuple(min(float(found[stage % num_devices]), float(num_microbatches)) for stage in range(num_stages))


def _caps(choice: str | Async, num_devices: int, num_chunks: int, num_microbatches: int) -> Sequence[float]:
    """Per device, the microbatches that it may have begun."""
    ranks = range(num_devices)
    if isinstance(choice, Async) and choice.in_flight is not None:
        return [choice.in_flight for _ in ranks]
    if choice in ("gpipe", "list"):
        return [num_microbatches for _ in ranks]
    if choice == "interleaved":
        return [most_begun(rank, num_devices, num_chunks) / num_chunks for rank in ranks]
    # In rounds, devices feed one another, so that each counts as far from the end as all of them, see ``depths``.
    return [num_devices if num_chunks > 1 else num_devices - rank for rank in ranks]
