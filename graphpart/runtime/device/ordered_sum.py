"""Sums in a fixed order, whatever the timing, that reuse memory where they may."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from graphpart.runtime.kernels.deferred import Late


class OrderedSum:
    """A sum whose terms may come in any order and are added in one."""

    __slots__ = ("_early", "_next", "is_own", "num_terms", "total")

    def __init__(self, num_terms: int) -> None:
        self.num_terms = num_terms
        self.total: Tensor | None = None
        self.is_own = False
        self._next = 0
        self._early: dict[int, tuple[Tensor | None, bool, Sequence[Late]]] = {}

    def add(self, position: int, term: Tensor | None, is_own: bool, late: Sequence[Late] = ()) -> bool:
        """Take one term; returns whether the sum is complete.

        Args:
            position: its place in the order.
            term: what has been made of it.
            is_own: whether that is nobody else's, so that it may be changed in place.
            late: what else belongs to it; made when its turn comes, straight into the sum.
        """
        self._early[position] = (term, is_own, late)
        while self._next in self._early:
            term, is_own, late = self._early.pop(self._next)
            if term is not None:
                self.total, self.is_own = plus(self.total, self.is_own, term, is_own)
            for each in late:
                self.total, self.is_own = each.add_to(self.total, self.is_own)
            self._next += 1
        return self._next == self.num_terms

    def take(self) -> tuple[Tensor | None, bool]:
        """What has been added since this was last asked, and whether it may be changed in place."""
        found, self.total = (self.total, self.is_own), None
        return found

    @property
    def whole(self) -> Tensor:
        """The sum, once every term is in."""
        assert self.total is not None and self._next == self.num_terms
        return self.total


def plus(total: Tensor | None, total_is_own: bool, term: Tensor, term_is_own: bool) -> tuple[Tensor, bool]:
    """A sum and whether it may be changed in place; written over a term that may be, which saves its memory."""
    if total is None:
        return term, term_is_own
    if total_is_own:
        return total.add_(term), True
    if term_is_own:
        return torch.add(total, term, out=term), True
    return total + term, True


def are_own(gradients: Sequence[Tensor | None], others: Iterable[Tensor | None]) -> list[bool]:
    """Which gradients share their memory with no other gradient of the segment (a sum passes one on to all terms)."""
    places = Counter(_place(g) for g in (*gradients, *others) if g is not None and g.layout == torch.strided)
    return [
        g is not None
        and g.layout == torch.strided
        and places[_place(g)] == 1
        and g.untyped_storage().nbytes() == g.numel() * g.element_size()  # not an expanded value, nor a part of one
        and g.is_contiguous()
        for g in gradients
    ]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
