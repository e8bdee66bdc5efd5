"""Degrees of a split, as people say them: ``dp4 tp8 pp2``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import product
from math import inf, log2, prod
from types import MappingProxyType
from typing import Any

import numpy as np

from graphpart.errors import ArgumentError

_LATER = MappingProxyType({"ep": "expert parallelism"})
"""Degrees that others know and that are not taken yet."""

_WORD = re.compile(r"([a-z]+)=?(-?\d+)?")

_EXAMPLES = MappingProxyType({"sp": "sp", "zero": "zero1"})

MOST = 1 << 16
"""Of one degree."""


@dataclass(frozen=True)
class Degrees:
    """Into how many parts each kind of split cuts: ``dp * tp * pp * cp`` devices.

    Devices of one tensor-parallel group are neighbours, then come the blocks of a sequence, then replicas, then stages:
    device ``((stage * dp + replica) * cp + block) * tp + part``, where devices are counted node by node.

    Attributes:
        dp: data parallel: replicas, each with a share of the samples.
        tp: tensor parallel: parts of the features of each operator with a weight.
        pp: pipeline parallel: stages, each with a part of the layers.
        cp: context parallel: blocks of the positions of every sequence, which attention gathers keys and values of; of
            images where there is no sequence.
        vp: virtual stages: intervals of layers that each stage has, given out in rounds, for an interleaved schedule.
        sp: sequence parallel: whether what has no weights (norms, dropouts, sums) is cut along positions, among the
            devices that share features, instead of repeated on each.
        zero: 1 for every parameter and its optimizer state cut evenly over its replicas, however small; 0 for whole
            ones where pieces are not worth their messages.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vp: int = 1
    sp: bool = False
    zero: int = 0

    def __post_init__(self) -> None:
        for name in (*_SPREAD, "vp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
                raise ArgumentError(f"degree {name}={value!r}; give a whole number from 1 to {MOST}")
        if not isinstance(self.sp, bool):
            raise ArgumentError(f"degree sp={self.sp!r}; give True or False")
        if isinstance(self.zero, bool) or not isinstance(self.zero, int) or not 0 <= self.zero <= 3:
            raise ArgumentError(f"degree zero={self.zero!r}; give 0 or 1")
        if self.zero > 1:
            raise ArgumentError(f"zero{self.zero} is not supported yet: gradients and weights are whole within a step")
        if self.vp > 1 and self.pp == 1:
            raise ArgumentError(f"vp{self.vp} gives each stage {self.vp} intervals of layers, which takes pp2 or more")
        if self.sp and self.tp == 1:
            raise ArgumentError("sp cuts positions among the devices that share features, which takes tp2 or more")
        if self.zero and self.dp == 1:
            raise ArgumentError(f"zero{self.zero} cuts parameters over their replicas, which takes dp2 or more")

    @classmethod
    def read(cls, text: str) -> Degrees:
        """The degrees that a text such as ``dp4 tp8 pp2`` says; what it leaves out is 1.

        Raises:
            ArgumentError: naming the word that is none, and what is nearest to it.
        """
        found: dict[str, Any] = {}
        for word in _words(text):
            match = _WORD.fullmatch(word)
            name = match[1] if match else word
            _check_name(name, word)
            if name in found:
                raise ArgumentError(f"{text!r} says {name} twice")
            if match is None or (match[2] is None) != (name == "sp"):
                says = "a" if match is not None and match[2] else "no"
                raise ArgumentError(f"{word!r} in {text!r} says {says} number; write {_EXAMPLES.get(name, name + '2')}")
            found[name] = True if name == "sp" else int(match[2])
        if not found:
            raise ArgumentError(f"{text!r} says no degrees; write 'dp4 tp8 pp2', for instance")
        return cls(**found)

    @property
    def num_devices(self) -> int:
        """Devices that these degrees are for."""
        return prod(getattr(self, name) for name in _SPREAD)

    def check(self, num_devices: int) -> None:
        """Refuse another number of devices.

        Raises:
            ArgumentError: with the nearest degrees that are for so many.
        """
        if self.num_devices != num_devices:
            product = " · ".join(f"{name}{getattr(self, name)}" for name in _SPREAD)
            raise ArgumentError(
                f"{str(self)!r} is for {product} = {self.num_devices} devices, but there are {num_devices}; the "
                f"nearest that is for {num_devices}: {str(self.nearest(num_devices))!r}"
            )

    def nearest(self, num_devices: int) -> Degrees:
        """Degrees for a number of devices, as like these as can be: factors between them first, then what differs.

        Of equals, the one that changes ``dp`` before ``cp``, that before ``pp``, and that before ``tp``. Positions are
        not cut where none were.
        """
        best: tuple[float, ...] = (inf,)
        found = Degrees(dp=num_devices)
        for tp, pp, cp in product(_divisors(num_devices), repeat=3):
            if num_devices % (tp * pp * cp) or (cp > 1 and self.cp == 1):
                continue
            dp = num_devices // (tp * pp * cp)
            pairs = ((self.tp, tp), (self.pp, pp), (self.cp, cp), (self.dp, dp))
            apart = round(sum(abs(log2(a / b)) for a, b in pairs), 9)
            key = (apart, *(int(a != b) for a, b in pairs))
            if key < best:
                best, found = key, self._for(dp, tp, pp, cp)
        return found

    def _for(self, dp: int, tp: int, pp: int, cp: int) -> Degrees:
        """These sizes, and what else goes with them."""
        return Degrees(dp, tp, pp, cp, self.vp if pp > 1 else 1, self.sp and tp > 1, self.zero if dp > 1 else 0)

    def stages(self) -> np.ndarray:
        """Devices by number, counted node by node, ``[pp, dp, cp, tp]``."""
        return np.arange(self.num_devices).reshape(self.pp, self.dp, self.cp, self.tp)

    def __str__(self) -> str:
        words = [f"{name}{getattr(self, name)}" for name in (*_SPREAD, "vp") if getattr(self, name) > 1]
        words += ["sp"] * self.sp + [f"zero{self.zero}"] * (self.zero > 0)
        return " ".join(words) or "dp1"


_SPREAD = ("dp", "tp", "pp", "cp")
"""Degrees that multiply to the number of devices."""

_NAMES = tuple(field.name for field in fields(Degrees))


def degrees(**given: Any) -> Degrees:
    """Degrees of a split, for ``strategy=``: ``degrees(dp=4, tp=8, pp=2)`` is ``"dp4 tp8 pp2"``.

    Args:
        **given: see :class:`graphpart.Degrees`; what is left out is 1.

    Raises:
        ArgumentError: if there is no such degree, or it has no such value.
    """
    for name in given:
        _check_name(name, f"{name}={given[name]!r}")
    return Degrees(**given)


def says_degrees(text: str) -> bool:
    """Whether a text is meant to say degrees: words that name one, or up to three letters and a number."""
    words, known = _words(text), {*_NAMES, *_LATER}
    found = [_WORD.fullmatch(word) for word in words]
    return bool(words) and all(m and (m[1] in known or (m[2] is not None and len(m[1]) < 4)) for m in found)


def _words(text: str) -> Sequence[str]:
    return text.replace(",", " ").lower().split()


def _check_name(name: str, word: str) -> None:
    if name in _LATER:
        raise ArgumentError(f"{word!r}: {_LATER[name]} is not supported yet; the degrees are {', '.join(_NAMES)}")
    if name not in _NAMES:
        near = get_close_matches(name, _NAMES, 1, 0.4)
        meant = f"; did you mean {word.replace(name, near[0], 1)!r}?" if near else ";"
        raise ArgumentError(f"there is no degree {word!r}{meant} the degrees are {', '.join(_NAMES)}")


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
