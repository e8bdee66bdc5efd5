"""What processes must have alike before they begin something together, and a difference between them in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

_MOST_SHOWN = 160
"""Most characters of a fact in an error; of a longer one, what surrounds the first difference."""

_BEFORE = 40
"""How many of them come before the difference."""

CALL, ARGUMENTS = "the call", "the arguments"

_ADVICE: Mapping[str, str] = {
    ARGUMENTS: "The processes are the devices of one model, so each calls it with the same batch: seed the data alike, "
    "use no DistributedSampler",
    CALL: "Each process has to make the same calls in the same order, also those whose result it does not use",
    "the weights": "Seed alike before the model is made, or load the same state_dict on every process",
    "constants": "Tensors that a forward makes or reads as plain attributes are each process's own: seed alike, or "
    "register them as buffers and load them",
    "versions": "Install the same on every host",
}
"""By part, what to do about a difference."""


class Fact(NamedTuple):
    """One thing that processes must have alike.

    Attributes:
        what: names it, such as ``aten.relu.default at model.act``.
        detail: all else that has to be the same.
        where: for errors alone: the user's line, which may lie in another folder on another host.
    """

    what: str
    detail: str = ""
    where: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What is compared."""
        return self.what, self.detail


@dataclass(frozen=True)
class FingerprintPart:
    """Facts of one kind.

    Attributes:
        name: what they are of, such as ``the graph``.
        facts: in an order that processes have alike if the facts are.
    """

    name: str
    facts: tuple[Fact, ...]

    @cached_property
    def digest(self) -> str:
        """Differs, with near certainty, where facts do."""
        return digest_of([self.name, *(text for fact in self.facts for text in fact.key)])


@dataclass(frozen=True)
class Fingerprint:
    """All that a process must have in common with the others.

    Attributes:
        parts: what explains the other differences comes first; a difference is told by the first part that has one.
    """

    parts: tuple[FingerprintPart, ...]

    @cached_property
    def digest(self) -> str:
        """Differs, with near certainty, where a part does."""
        return digest_of([part.digest for part in self.parts])

    def difference(self, other: Fingerprint, name: str, other_name: str) -> str:
        """How this one differs from another, in words; empty where they are alike.

        Args:
            other: what to compare with.
            name: whose this is, such as ``rank 1``.
            other_name: whose the other is.
        """
        theirs = {part.name: part for part in other.parts}
        own = {part.name: part for part in self.parts}
        names = [n for n in dict.fromkeys([*own, *theirs]) if _digest(own.get(n)) != _digest(theirs.get(n))]
        if not names:
            return ""
        first, *rest = names
        pair = own.get(first, FingerprintPart(first, ())), theirs.get(first, FingerprintPart(first, ()))
        said = f"{first}: {_first_difference(*pair, name, other_name)}"
        also = f" (and in {', '.join(rest)})" if rest and first != CALL else ""
        advice = _ADVICE.get(first, "Every process has to make the same model, plan and calls")
        return f"{said}{also}. {advice}"

    def dumped(self) -> bytes:
        """As bytes, for other processes, also those of another version."""
        return json.dumps([[part.name, part.facts] for part in self.parts]).encode()

    @classmethod
    def loaded(cls, data: bytes) -> Fingerprint:
        """What :meth:`dumped` wrote."""
        return cls(
            tuple(FingerprintPart(name, tuple(Fact(*fact) for fact in facts)) for name, facts in json.loads(data))
        )


@dataclass(frozen=True)
class Claim:
    """What a process is about to do, for all processes to compare.

    Attributes:
        what: in words, such as ``train_step of Net``.
        deadline_s: how long to wait for the others.
        texts: what tells it from other claims; equal, with certainty, where its fingerprint is.
        fingerprint: makes the fingerprint, which is needed only where texts differ.
        sizes: the absolute values of some gradients added up, and their sum: alike but for rounding.
        seed: what the first process's gives to all.
    """

    what: str
    deadline_s: float
    texts: Callable[[], Iterable[str]]
    fingerprint: Callable[[], Fingerprint]
    sizes: tuple[float, float] = (0.0, 0.0)
    seed: int = 0


def digest_of(texts: Iterable[str]) -> str:
    """A short text that differs, with near certainty, where a list of texts does."""
    framed = "".join([f"{len(text)}:{text}" for text in texts])
    return hashlib.blake2b(framed.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def differing_ranks(numbers: Sequence[object]) -> list[int]:
    """The ranks that have another number than the first."""
    return [rank for rank, number in enumerate(numbers) if number != numbers[0]]


def _digest(part: FingerprintPart | None) -> str | None:
    return None if part is None else part.digest


def _first_difference(own: FingerprintPart, other: FingerprintPart, name: str, other_name: str) -> str:
    for mine, its in zip_longest(own.facts, other.facts):
        if mine is None or its is None:
            has, lacks = (name, other_name) if its is None else (other_name, name)
            return f"{has} has {_shown(mine or its, None)} where {lacks} has no more"
        if mine.key != its.key:
            theirs = _detail(its, mine) if its.what == mine.what else _shown(its, mine)
            return f"{name} has {_shown(mine, its)} where {other_name} has {theirs}"
    return f"{name} and {other_name} differ"  # a part that only one of them has, without a fact


def _shown(fact: Fact, other: Fact | None) -> str:
    """A fact as an error names it; its detail only where that is what differs, or nothing else says where it is."""
    where = f" ({fact.where})" if fact.where else ""
    if other is not None and fact.what == other.what:
        return f"{fact.what}{where} {_detail(fact, other)}"
    return fact.what + where + (f" {_clipped(fact.detail, 0)}" if fact.detail and not where else "")


def _detail(fact: Fact, other: Fact) -> str:
    """The detail of a fact, above all where it differs from another's."""
    same = next((i for i, (a, b) in enumerate(zip(fact.detail, other.detail, strict=False)) if a != b), 0)
    return _clipped(fact.detail, same)


def _clipped(text: str, place: int) -> str:
    """At most so many characters of a text, around a place of it."""
    if len(text) <= _MOST_SHOWN:
        return text
    start = max(0, min(place - _BEFORE, len(text) - _MOST_SHOWN))
    end = start + _MOST_SHOWN
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
