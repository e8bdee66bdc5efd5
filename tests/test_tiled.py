"""Parameters as tiles: optimizers and clipping must be exact, and all that is not exact must be refused."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from graphpart.errors import ParameterError
from graphpart.ir.region import Intervals, Region
from graphpart.runtime.parameters.tiled_tensor import TiledLayout, TiledTensor, TileHome, from_full, retile_

OPTIMIZERS = {
    "sgd": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, **kw),
    "sgd-maximize": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, maximize=True, **kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, maximize=True, **kw),
    "adagrad": lambda p, **kw: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1, **kw),
    "rmsprop": lambda p, **kw: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1, **kw),
    "adamw-tensor-lr": lambda p, **kw: torch.optim.AdamW(p, lr=torch.tensor(0.01), **kw),
    **{
        name.lower(): lambda p, _name=name, **kw: getattr(torch.optim, _name)(p, **kw)
        for name in ("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop")
    },
}


def region(*dims: object) -> Region:
    """A region from one set for each dimension: ``(start, stop)`` or a list of indices."""
    return Region(tuple(Intervals.span(*dim) if isinstance(dim, tuple) else Intervals.indices(dim) for dim in dims))


def tiling(shape: tuple[int, ...], *regions: Region, ranks: tuple[int, ...] = ()) -> TiledLayout:
    return TiledLayout(shape, tuple(TileHome(part, ranks[i] if ranks else 0) for i, part in enumerate(regions)))


def uneven(ranks: tuple[int, ...] = ()) -> TiledLayout:
    """[8, 6] in an upper block and two index sets of columns below it."""
    return tiling((8, 6), region((0, 3), (0, 6)), region((3, 8), [0, 2, 5]), region((3, 8), [1, 3, 4]), ranks=ranks)


def rows(shape: tuple[int, ...], cuts: tuple[int, ...], ranks: tuple[int, ...] = ()) -> TiledLayout:
    edges = (0, *cuts, shape[0])
    rest = [(0, n) for n in shape[1:]]
    return tiling(shape, *(region((a, b), *rest) for a, b in pairwise(edges)), ranks=ranks)


def scattered() -> TiledLayout:
    """[8, 6] as a grid of index sets in both dimensions."""
    sides = [([0, 3, 4, 7], [1, 2, 5, 6]), ([0, 2, 4], [1, 3, 5])]
    return tiling((8, 6), *(region(down, across) for down in sides[0] for across in sides[1]))


def pair(
    tilings: list[TiledLayout], dtype: torch.dtype = torch.float64
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Plain parameters and equal ones, not yet tiled."""
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(t.shape, dtype=dtype)) for t in tilings]
    return plain, [nn.Parameter(p.detach().clone()) for p in plain]


def set_grads(plain: list[nn.Parameter], tiled: list[nn.Parameter], seed: int) -> None:
    torch.manual_seed(100 + seed)
    for p, t in zip(plain, tiled, strict=True):
        p.grad = torch.randn_like(p)
        t.grad = from_full(p.grad, t.tiling, t.rank, t.process_group)


LAYOUTS = [
    uneven(),
    scattered(),
    rows((7,), (2,)),
    rows((5, 2, 3), (1, 2)),
    TiledLayout.whole((3, 3)),
    TiledLayout.whole(()),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("before", [False, True], ids=["optimizer-after", "optimizer-before"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pointwise_optimizers_are_bit_equal(name: str, before: bool, foreach: bool) -> None:
    layouts = LAYOUTS[:-1] if name == "rprop" else LAYOUTS  # Rprop indexes a 0-dim parameter, which is refused
    plain, tiled = pair(layouts, torch.float32)
    kwargs = {"foreach": foreach} if not (foreach and name.endswith("tensor-lr")) else {}
    optimizers = [OPTIMIZERS[name](plain, **kwargs)]
    if before:
        optimizers.append(OPTIMIZERS[name](tiled, **kwargs))
    for parameter, layout in zip(tiled, layouts, strict=True):
        retile_(parameter, layout)
    if not before:
        optimizers.append(OPTIMIZERS[name](tiled, **kwargs))
    for step in range(5):
        set_grads(plain, tiled, step)
        for optimizer in optimizers:
            optimizer.step()
    for p, t in zip(plain, tiled, strict=True):
        assert isinstance(t, TiledTensor)
        assert torch.equal(t.full_tensor(), p)


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, 0.0, float("inf"), float("-inf")])
@pytest.mark.parametrize("foreach", [None, True])
def test_norms_and_clipping(order: float, foreach: bool | None) -> None:
    plain, tiled = pair(LAYOUTS)
    for parameter, layout in zip(tiled, LAYOUTS, strict=True):
        retile_(parameter, layout)
    set_grads(plain, tiled, 0)
    for p, t in zip(plain, tiled, strict=True):
        torch.testing.assert_close(t.norm(order), p.norm(order), rtol=1e-12, atol=0)
        if len(t.tiling.tiles) == 1:
            assert torch.equal(t.norm(order), p.norm(order))
    if order > 0:
        norms = [clip_grad_norm_(ps, 0.5, norm_type=order, foreach=foreach) for ps in (plain, tiled)]
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-12, atol=0)
        for p, t in zip(plain, tiled, strict=True):
            torch.testing.assert_close(t.grad.full_tensor(), p.grad, rtol=1e-12, atol=0)


def test_clip_by_value_and_nonfinite_norm() -> None:
    for foreach in (None, True):
        plain, tiled = pair([uneven()])
        retile_(tiled[0], uneven())
        set_grads(plain, tiled, 0)
        clip_grad_value_(plain, 0.3)
        clip_grad_value_(tiled, 0.3, foreach=foreach)
        assert torch.equal(tiled[0].grad.full_tensor(), plain[0].grad)
    tiled[0].grad.local_tiles[1][0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(tiled, 1.0, error_if_nonfinite=True)
    assert torch.isnan(tiled[0].grad.norm(float("inf")))


def test_scheduler_state_dict_and_whole_checkpoints() -> None:
    plain, tiled = pair([uneven(), rows((7,), (2,))])
    for t, layout in zip(tiled, (uneven(), rows((7,), (2,))), strict=True):
        retile_(t, layout)
    optimizers = [torch.optim.AdamW(ps, lr=0.1) for ps in (plain, tiled)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5) for optimizer in optimizers]
    for step in range(4):
        set_grads(plain, tiled, step)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    saved, expected = optimizers[1].state_dict(), optimizers[0].state_dict()
    for index, state in saved["state"].items():
        assert torch.equal(state["exp_avg"].full_tensor(), expected["state"][index]["exp_avg"])
    fresh = torch.optim.AdamW(tiled, lr=1.0)
    fresh.load_state_dict(copy.deepcopy(expected))  # whole tensors, as a plain program saved them
    set_grads(plain, tiled, 9)
    optimizers[0].step()
    fresh.step()
    assert all(torch.equal(t.full_tensor(), p) for p, t in zip(plain, tiled, strict=True))
    fresh.load_state_dict(saved)


def test_optimizer_state_follows_a_change_of_plan() -> None:
    plain, tiled = pair([uneven()])
    optimizers = [torch.optim.AdamW(ps) for ps in (plain, tiled)]
    for step, layout in enumerate((uneven(), scattered(), TiledLayout.whole((8, 6)), rows((8, 6), (1, 5)))):
        assert retile_(tiled[0], layout) is tiled[0]
        set_grads(plain, tiled, step)
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(tiled[0].full_tensor(), plain[0])
        assert optimizers[1].state[tiled[0]]["exp_avg"].tiling == layout


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("Muon", lambda ps: torch.optim.Muon(ps)),
        ("Adafactor", lambda ps: torch.optim.Adafactor(ps)),
        ("LBFGS", lambda ps: torch.optim.LBFGS(ps)),
        ("AdamW", lambda ps: torch.optim.AdamW(ps, fused=True)),
    ],
)
def test_optimizers_refused_before_anything_changes(name: str, make: object) -> None:
    plain, tiled = pair([uneven()])
    optimizer = make(tiled)
    retile_(tiled[0], uneven())
    set_grads(plain, tiled, 0)
    with pytest.raises(ParameterError, match=rf"{name}.*\[8, 6\].*AdamW"):
        optimizer.step(lambda: torch.zeros(()))
    assert torch.equal(tiled[0].full_tensor(), plain[0])
    assert not optimizer.state[tiled[0]]


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    return x @ x.T @ x


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        ("aten.permute", newton_schulz),
        ("aten.mm", lambda t: t @ torch.ones(6, 2, dtype=t.dtype)),
        ("aten.mean.dim", lambda t: t.square().mean(dim=-1)),
        ("aten.linalg_vector_norm", lambda t: t.norm(dim=0)),
        ("aten.max.dim", lambda t: t.max(0)),
        ("aten.view", lambda t: t.view(-1)),
        ("aten.select", lambda t: t[0]),
        ("aten.normal_", lambda t: t.normal_()),
        ("aten.rand_like", lambda t: torch.rand_like(t)),
        ("aten._to_copy", lambda t: t.to("meta")),
        ("aten.copy_", lambda t: torch.zeros(8, 6, dtype=t.dtype).copy_(t)),
        ("aten.add_", lambda t: torch.zeros(8, 6, dtype=t.dtype).add_(t)),
        ("aten._foreach_add_", lambda t: torch._foreach_add_([torch.zeros(8, 6, dtype=t.dtype)], [t])),
        ("aten._foreach_max", lambda t: torch._foreach_max([t])),
        ("aten.mul", lambda t: t * torch.ones(2, 8, 6, dtype=t.dtype)),
        ("aten.mul", lambda t: t * from_full(torch.ones(8, 6, dtype=t.dtype), scattered())),
        ("aten.cumsum", lambda t: t.cumsum(0)),
    ],
)
def test_operations_refused_by_name(operation: str, call: object) -> None:
    tensor = from_full(torch.ones(8, 6, dtype=torch.float64), uneven())
    with pytest.raises(ParameterError, match=rf"{operation}.*\[8, 6\] in 3 tiles.*full_tensor"):
        call(tensor)


def test_fused_kernel_and_scalar_reads_are_refused() -> None:
    tensor = from_full(torch.ones(8, 6), uneven())
    with pytest.raises(ParameterError, match="_fused_adamw_"):
        torch._fused_adamw_(*[[tensor]] * 4, [], [torch.tensor(1.0)], lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0,
                            eps=1e-8, amsgrad=False, maximize=False)  # fmt: skip
    with pytest.raises(ParameterError, match="_local_scalar_dense"):
        from_full(torch.ones(()), TiledLayout.whole(())).item()
    refused = (copy.deepcopy, pickle.dumps, TiledTensor.numpy, TiledTensor.tolist, TiledTensor.data_ptr)
    for use in (*refused, TiledTensor.share_memory_, TiledTensor.__array__, TiledTensor.__dlpack__):
        with pytest.raises(ParameterError, match="full_tensor"):
            use(tensor)


def test_plain_operands_are_cut_and_dtypes_follow_torch() -> None:
    whole, other = torch.randn(8, 6), torch.randn(8, 6, dtype=torch.float64)
    tensor = from_full(whole, uneven())
    assert torch.equal((tensor * other[0]).full_tensor(), whole * other[0])
    assert torch.equal((tensor + other).full_tensor(), whole + other)
    assert (tensor * torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float32
    assert torch.equal(tensor.copy_(other).full_tensor(), other.float())
    out = torch.empty_like(tensor)
    assert torch.add(tensor, tensor, out=out) is out
    assert torch.equal(out.full_tensor(), tensor.full_tensor() * 2)
    assert torch.equal(tensor, tensor.full_tensor())
    assert not torch.equal(tensor, out)
    torch.testing.assert_close(tensor.sum(), other.float().sum())
    torch.testing.assert_close(tensor.mean(), other.float().mean())
    assert tensor.max() == other.float().max()
    assert bool(tensor.isfinite().all()) and not bool((tensor == 0).any())
    assert type(tensor.new_zeros(3)) is torch.Tensor
    assert isinstance(tensor.new_ones((8, 6)), TiledTensor)


def test_tilings_that_do_not_cover_once_are_refused() -> None:
    whole = region((0, 8), (0, 6))
    for parts, message in [
        ([], "at least one"),
        ([whole, region((7, 8), [5])], r"element \[7, 5\] is in 2"),
        ([region((0, 8), [0, 1, 2, 4, 5])], r"element \[0, 3\] is in 0"),
        ([region((0, 9), (0, 6))], "does not lie"),
        ([region((0, 8))], "does not lie"),
        ([whole, region((0, 0), (0, 6))], "empty"),
    ]:
        with pytest.raises(ParameterError, match=message):
            tiling((8, 6), *parts)
    assert TiledLayout.whole((0, 3)).tiles[0].region.num_elements == 0
    assert from_full(torch.ones(0, 3), TiledLayout.whole((0, 3))).full_tensor().shape == (0, 3)
    with pytest.raises(ParameterError, match="shapes"):
        TiledTensor(uneven(), [torch.ones(3, 6)])
    with pytest.raises(ParameterError, match="dtype"):
        TiledTensor(uneven(), [torch.ones(3, 6), torch.ones(5, 3), torch.ones(5, 3).double()])


@st.composite
def tilings(draw: st.DrawFn) -> TiledLayout:
    """Grids whose sides are arbitrary index sets, in an arbitrary order."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    sides = []
    for extent in shape:
        owners = draw(st.lists(st.integers(0, 2), min_size=extent, max_size=extent))
        sides.append([[i for i in range(extent) if owners[i] == owner] for owner in sorted(set(owners))])
    parts: list[tuple[list[int], ...]] = [()]
    for side in sides:
        parts = [(*part, dim) for part in parts for dim in side]
    return tiling(shape, *(region(*part) for part in draw(st.permutations(parts))))


@settings(max_examples=40, deadline=None)
@given(tilings())
def test_any_tiling_round_trips_and_steps_exactly(layout: TiledLayout) -> None:
    plain, tiled = pair([layout])
    retile_(tiled[0], layout)
    assert torch.equal(tiled[0].full_tensor(), plain[0])
    torch.testing.assert_close(tiled[0].norm(), plain[0].norm(), rtol=1e-12, atol=0)
    set_grads(plain, tiled, 0)
    for parameters in (plain, tiled):
        torch.optim.AdamW(parameters, lr=0.1).step()
    assert torch.equal(tiled[0].full_tensor(), plain[0])


def test_grad_scaler_unscales_and_skips() -> None:
    plain, tiled = pair([uneven()], torch.float32)
    retile_(tiled[0], uneven())
    for bad in (False, True):
        set_grads(plain, tiled, 0)
        if bad:
            plain[0].grad[7, 5] = tiled[0].grad.local_tiles[1][4, 2] = float("inf")
        for parameters in (plain, tiled):
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            scaler.scale(torch.zeros(()))
            scaler.step(torch.optim.SGD(parameters, lr=0.1))
            scaler.update()
            assert scaler.get_scale() == (2.0 if bad else 4.0)
        assert torch.equal(tiled[0].full_tensor(), plain[0])
