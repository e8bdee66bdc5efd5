"""Processes compare what they are about to do, before any of them does it."""

from __future__ import annotations

import datetime
import math
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from graphpart.errors import RanksDifferError
from graphpart.runtime.executors.fingerprint import (
    Claim,
    Fact,
    Fingerprint,
    FingerprintPart,
    differing_ranks,
    digest_of,
)
from graphpart.runtime.executors.peer_faults import Fault, faults_named, is_timeout, known_fault, publish_fault
from graphpart.runtime.kernels.memory import as_bytes, settled

_TAG = 2**30 + 1
"""Of messages of this file alone: they never meet a collective, or one of another size, of a process that is elsewhere.
Collectives would: Gloo aborts a process where two of the same kind, but of different sizes, meet.
"""

_CLOSE = 0.02
"""Sizes that differ by less, relative to the larger, are alike: hosts of other kinds round otherwise."""


def compare_ranks(claim: Claim, group: dist.ProcessGroup | None) -> int:
    """Wait until every process has come as far, and go on only if all are about to do the same.

    Args:
        claim: what this process is about to do.
        group: through which processes send each other messages; None for the whole world's own.

    Returns:
        The first process's seed.

    Raises:
        RanksDifferError: on every process, if they are about to do different things; it says who has what. Nothing has
            run, and the processes may go on.
        DeadlineError: on every process, if one does not come in time; it names that process.
        ExecutionError: if a process has ended, or has failed before.
    """
    peers = _Peers(claim, group)
    number = int(digest_of(claim.texts()), 16) >> 1
    own = torch.tensor([number, claim.seed, *map(_as_int, claim.sizes)], dtype=torch.int64)
    rows = [tuple(row.tolist()) for row in peers.gather(own, [own.numel()] * peers.world)]
    odd = differing_ranks([row[0] for row in rows])
    if odd:
        _say_difference(claim, peers, odd)
    sizes = [(_as_float(row[2]), _as_float(row[3])) for row in rows]
    far = [rank for rank, found in enumerate(sizes) if not _are_close(found, sizes[0])]
    if far:
        raise RanksDifferError(
            f"ranks differ in the gradients that {claim.what} begins with: rank {_listed(far)} has some whose sizes "
            f"add up to {sizes[far[0]][0]:.4g} (their sum is {sizes[far[0]][1]:.4g}) where rank 0 has "
            f"{sizes[0][0]:.4g} ({sizes[0][1]:.4g}). Compute the same loss on every process. Nothing has run backward"
        )
    return int(rows[0][1])


def _say_difference(claim: Claim, peers: _Peers, odd: list[int]) -> NoReturn:
    """Raise the same error on every process, made of what the first has and the first that has something else."""
    speaking = peers.rank in (0, odd[0])
    data = bytearray(claim.fingerprint().dumped() if speaking else b"")
    lengths = peers.gather(torch.tensor([len(data)]), [1] * peers.world)
    sizes = [int(length) for length in lengths]
    own = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    found = peers.gather(own, sizes)
    first, other = (Fingerprint.loaded(bytes(found[rank].tolist())) for rank in (0, odd[0]))
    said = other.difference(first, f"rank {odd[0]}", "rank 0") or "something that has no name"
    more = f". Rank {_listed(odd[1:])} differs from rank 0, too" if odd[1:] else ""
    raise RanksDifferError(f"ranks differ in {said}{more}. Nothing has run")


@dataclass
class _Peers:
    """The other processes, each of which is waited for by name."""

    claim: Claim
    group: dist.ProcessGroup | None
    rank: int = field(default_factory=dist.get_rank)
    world: int = field(default_factory=dist.get_world_size)

    def gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """What every process gives, by rank.

        Args:
            own: one-dimensional.
            sizes: number of elements by rank, known to all.
        """
        end_s = time.monotonic() + self.claim.deadline_s
        found = [torch.empty(size, dtype=own.dtype) for size in sizes]
        found[self.rank] = own
        others = [rank for rank in range(self.world) if rank != self.rank]
        works: list[tuple[int, Any]] = []
        for rank in others if own.numel() else ():
            with self._named(rank):
                works.append((rank, dist.isend(own, rank, group=self.group, tag=_TAG)))
        for rank in others:
            if sizes[rank]:
                with self._named(rank):
                    works.append((rank, dist.irecv(found[rank], rank, group=self.group, tag=_TAG)))
        for rank, work in works:
            with self._named(rank):
                work.wait(datetime.timedelta(seconds=max(0.001, end_s - time.monotonic())))
        return found

    @contextmanager
    def _named(self, rank: int) -> Iterator[None]:
        """Around a wait for one process: names it where it does not come, and tells the others."""
        claim = self.claim
        with faults_named(f"rank {self.rank} waited for rank {rank} to come to {claim.what}", claim.deadline_s):
            try:
                yield
            except RuntimeError as reason:
                if not known_fault():
                    is_late = is_timeout(reason)
                    what = f"did not come within {claim.deadline_s:.3g} s" if is_late else "has ended"
                    says = f"rank {rank} {what}: rank {self.rank} is at {claim.what}, which every process has to call"
                    with suppress(RuntimeError):  # the store may have ended with that process
                        publish_fault(Fault(says, is_late), self.world - (1 if is_late else 2), self.group)
                raise


def contents(leaves: Iterable[Any]) -> list[str]:
    """Per argument, a text that differs where it does; values on a GPU are left out, as reading them would wait for
    the device.
    """
    return [_content(leaf) for leaf in leaves]


def _content(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf) if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf).__name__
    content = 0
    if leaf.device.type == "cpu" and leaf.numel():
        data = as_bytes(settled(leaf.detach()))
        words = data.view(torch.int64) if data.numel() % 8 == 0 else data
        places = torch.arange(1, words.numel() + 1)
        content = int((words * places).sum(dtype=torch.int64))
    return f"{leaf.dtype} {list(leaf.shape)} of contents {content:x}"


def sizes_of(tensors: Iterable[Tensor]) -> tuple[float, float]:
    """The sum of the absolute values of some tensors, and that of the values; those on a GPU are left out."""
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors if t.device.type == "cpu"]
    wide = [settled(t.detach()).double() for t in real]
    return sum(float(t.abs().sum()) for t in wide), sum(float(t.sum()) for t in wide)


def facts_of(values: Mapping[str, Any]) -> tuple[Fact, ...]:
    """A fact for each named tensor or number."""
    return tuple(Fact(name, _content(value)) for name, value in values.items())


def alone(what: str, deadline_s: float, *parts: FingerprintPart, sizes: tuple[float, float] = (0.0, 0.0)) -> Claim:
    """A claim that is made once, so that its fingerprint is as good as a text."""
    fingerprint = Fingerprint(parts)
    return Claim(what, deadline_s, lambda: [fingerprint.digest], lambda: fingerprint, sizes)


def _are_close(found: tuple[float, float], first: tuple[float, float]) -> bool:
    largest = max(found[0], first[0])
    if not math.isfinite(largest):
        return math.isfinite(found[0]) == math.isfinite(first[0])
    return all(abs(a - b) <= _CLOSE * largest for a, b in zip(found, first, strict=True))


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _as_int(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _as_float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
