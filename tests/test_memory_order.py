"""Operators that go by memory: strides, storages shared between arguments, masks, and updates from several threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import ExecutionError, PlacementError, UnsupportedOperatorError
from graphpart.trace import trace


def _fill_diagonal_of_slice(h: Tensor) -> Tensor:
    y = h * 1.0
    y[:, 1:6].fill_diagonal_(0.5)
    return y


def _add_to_window(h: Tensor) -> Tensor:
    y = h * 1.0
    y.as_strided((3, 3), (9, 2)).add_(1.0)
    return y


def _by_own_strides(h: Tensor) -> Tensor:
    s, d = h.stride()
    return h.as_strided((h.shape[0] // 2 - 1, 4, h.shape[1]), (2 * s, s, d))


def _masked(h: Tensor) -> Tensor:
    y = h * 1.0
    y[y > 0] = 0.0
    return y


def _masked_rows(h: Tensor) -> Tensor:
    y = h * 1.0
    y[y.detach().sum(1) > 0] = y[0] * 2
    return y


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "own_strides": _by_own_strides,
    "own_strides_transposed": lambda h: _by_own_strides(h.t().contiguous().t()),
    "transposed": lambda h: torch.as_strided(h.t(), (3, 3), (1, 2)),
    "offset_in_the_whole": lambda h: h[2:].as_strided((2, 2), (8, 1), 20),
    "gaps": lambda h: h[:, 1:5].as_strided((4, 2), (8, 1)),
    "expanded": lambda h: h.unsqueeze(1).expand(8, 3, 8).contiguous().as_strided((8, 8), (24, 1)),
    "added_in_place": _add_to_window,
    "diagonal": _fill_diagonal_of_slice,
    "unfold": lambda h: h.t().unfold(0, 3, 2),
    "complex": lambda h: torch.view_as_real(torch.view_as_complex(h.reshape(8, 4, 2)) * 1j).flatten(1),
    "bits": lambda h: h + h.detach().t().contiguous().view(torch.int32).view(torch.float32).t(),
    "empty_strided": lambda h: torch.empty_strided((8, 8), (1, 8)).copy_(h).as_strided((4, 8), (1, 8)),
    "masked": _masked,
    "masked_rows": _masked_rows,
    "mask_get": lambda h: torch.where(h > 0, h, 0.0).masked_fill(h < -1, 2.0),
}
PLACES = ({"strategy": "layer", "num_microbatches": 2}, {"strategy": "batch"}, {"strategy": "feature"})


class Kept(nn.Module):
    """A value that other devices make, handled by its memory."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.way = nn.Linear(8, 8), way

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way](self.a(x.tanh()))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("options", PLACES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_strides_are_those_of_the_trace(way: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    x = torch.randn(8, 8)
    parted = Kept(way)
    plain = copy.deepcopy(parted)
    want = plain(x)
    weight = torch.randn_like(want)
    (want * weight).sum().backward()
    model = gp.partition(parted, 2, **options)
    got = model(x)
    (got * weight).sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(model.grad_dict()["a.weight"], plain.a.weight.grad)


class Beyond(nn.Module):
    """Reads what is not the operand's."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.as_strided((4, 8), (8, 1)))


def test_an_argument_addressed_by_strides_has_to_lie_as_the_traced_one() -> None:
    plain = Beyond()
    parted = gp.partition(copy.deepcopy(plain), 2, strategy="layer")
    x = torch.randn(8, 8)
    for other in (x, torch.cat([x, x])[4:12], torch.cat([x, x])[4:12].clone(), x.t(), x.t()[2:]):
        torch.testing.assert_close(parted(other), plain(other))
    with pytest.raises(UnsupportedOperatorError, match=r"memory that is not its operand's"):
        trace(Beyond(), (x[:, :4],))


class Changing(nn.Module):
    """Changes its first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x.add_(1.0)
        return self.norm(self.a(x + y))


def test_one_tensor_given_twice_and_changed_in_place() -> None:
    model = Changing()
    plain, parted = copy.deepcopy(model), gp.partition(model, 2, strategy="layer")
    z = torch.randn(6, 4)
    for pair in ((0, 1), (0, 0), (0, 1), (0, 0)):
        ours, theirs = [z.clone(), z.clone()], [z.clone(), z.clone()]
        torch.testing.assert_close(parted(*(ours[i] for i in pair)), plain(*(theirs[i] for i in pair)))
        torch.testing.assert_close(ours, theirs)


def test_arguments_that_overlap_are_refused_or_right() -> None:
    model, z = Changing(), torch.randn(6, 4)
    plain, parted = copy.deepcopy(model), gp.partition(model, 2, strategy="layer")
    parted(z.clone(), z.clone())
    plain(z.clone(), z.clone())
    for views in (lambda z: (z[:5], z[1:]), lambda z: (z, z.t()[:, :6].t())):
        ours, theirs = z.clone(), z.clone()
        try:
            found = parted(*views(ours))
        except UnsupportedOperatorError as refusal:
            assert "in place, and the argument" in str(refusal)
            continue
        torch.testing.assert_close(found, plain(*views(theirs)))
        torch.testing.assert_close(ours, theirs)


def test_concurrent_calls_lose_no_update() -> None:
    model = Changing()
    parted = gp.partition(model, 2, strategy="layer")
    z = torch.randn(6, 4)
    parted(z.clone(), z)

    def call() -> None:
        for _ in range(10):
            parted(z.clone(), z)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int(model.norm.num_batches_tracked) == 41


class Classes(nn.Module):
    """A loss over classes that are cut."""

    def __init__(self, ignored: int = -100) -> None:
        super().__init__()
        self.a, self.ignored = nn.Linear(4, 6), ignored

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.a(x), labels, ignore_index=self.ignored)


def test_labels_out_of_range_are_refused_by_parts_of_the_classes() -> None:
    x = torch.randn(5, 4)
    parted = gp.partition(Classes(), 2, strategy="feature")
    parted(x, torch.tensor([0, 1, -100, 3, 5]))
    for wrong in (9, -1, 6):
        with pytest.raises(ExecutionError, match=f"Target {wrong} is out of bounds") as caught:
            parted(x, torch.tensor([0, 1, wrong, 3, 4]))
        assert isinstance(caught.value.__cause__, IndexError)
    model = Classes(ignored=77)
    plain = copy.deepcopy(model)
    labels = torch.tensor([0, 77, 2, 3, 77])
    torch.testing.assert_close(gp.partition(model, 2, strategy="feature")(x, labels), plain(x, labels))


class Table(nn.Module):
    """A table with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a = nn.Embedding(12, 8, sparse=True), nn.Linear(8, 8)

    def forward(self, words: Tensor) -> Tensor:
        return self.a(self.e(words)).square().sum()


@pytest.mark.parametrize(
    "options",
    [{"strategy": "layer"}, {"strategy": "layer", "num_microbatches": 2}, {"strategy": {"e": 0, "a": 1}}],
    ids=str,
)
def test_sparse_gradients_are_made_where_the_table_is(options: dict[str, Any]) -> None:
    words = torch.arange(18).reshape(6, 3) % 12
    model = Table()
    plain = copy.deepcopy(model)
    plain(words).backward()
    parted = gp.partition(model, 2, **options)
    parted(words).backward()
    found = parted.get_parameter("e.weight").grad
    assert found is not None and found.is_sparse
    torch.testing.assert_close(found.to_dense(), plain.e.weight.grad.to_dense())


@pytest.mark.parametrize("strategy", ["batch", "feature"])
def test_sparse_gradients_are_neither_cut_nor_sent(strategy: str) -> None:
    with pytest.raises(PlacementError, match=r"the table 'e.weight' a sparse gradient.*sparse=False"):
        gp.partition(Table(), 2, strategy=strategy)(torch.zeros(6, 3, dtype=torch.long))
