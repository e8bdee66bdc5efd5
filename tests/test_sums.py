"""Sums in a fixed order."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from graphpart.runtime.device.ordered_sum import OrderedSum
from graphpart.runtime.kernels.deferred import Late
from graphpart.runtime.kernels.operand_gradients import OPERAND_GRADIENTS


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("own", [False, True])
def test_terms_that_come_in_any_order_are_added_in_one(order: tuple[int, ...], own: bool) -> None:
    terms = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    found = OrderedSum(3)
    complete = [found.add(i, terms[i].clone(), own) for i in order]
    assert complete == [False, False, True]
    assert torch.equal(found.whole, terms[0] + terms[1] + terms[2])


def test_a_tensor_that_comes_twice_counts_twice() -> None:
    term = torch.ones(2)  # what an identity passes on from one gradient to two readers
    found = OrderedSum(2)
    found.add(0, term, False)
    assert found.add(1, term, False)
    assert torch.equal(found.whole, torch.full((2,), 2.0)) and torch.equal(term, torch.ones(2))


@pytest.mark.parametrize("own", [False, True])
def test_what_is_late_gives_the_same_bits_whenever_it_comes(own: bool) -> None:
    torch.manual_seed(0)
    sums = []
    for order in permutations(range(4)):
        x, weight = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 3)
        _, of_weight, *_ = OPERAND_GRADIENTS["aten.linear.default"](x[0], weight)
        edge = get_gradient_edge(weight.requires_grad_())
        late = [Late(0, edge, of_weight, weight.shape, x[i, :, :2], (x[i],), (0,)) for i in range(4)]
        found = OrderedSum(4)
        for i in order:
            term = torch.ones(2, 3) if i % 2 else None
            assert found.add(i, term, own, [late[i], late[i]]) == (i == order[-1])
        sums.append(found.whole)
    assert all(torch.equal(total, sums[0]) for total in sums)
    torch.testing.assert_close(sums[0], 2.0 + 2 * torch.einsum("bro,bri->oi", x[:, :, :2], x))
