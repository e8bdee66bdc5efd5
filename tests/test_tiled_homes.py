"""Where tiles live: re-homing a parameter in place, autograd through it, and several processes."""

import gc
import time
import traceback
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_

from graphpart.errors import ParameterError
from graphpart.runtime.parameters.tiled_tensor import TiledLayout, TiledTensor, from_full, retile_
from tests.helpers.processes import forking
from tests.test_tiled import OPTIMIZERS, pair, rows, scattered, set_grads, uneven


def test_rank_without_tiles_updates_nothing_and_asks_for_a_group() -> None:
    layout = uneven(ranks=(0, 0, 2))
    plain, tiled = pair([layout, layout])
    for rank, t in zip((1, 2), tiled, strict=True):
        retile_(t, layout, rank=rank)
    assert tiled[0].local_tiles == () and len(tiled[1].local_tiles) == 1
    for foreach in (False, True):
        optimizers = [torch.optim.AdamW(ps, foreach=foreach) for ps in (plain, tiled)]
        for step in range(3):
            set_grads(plain, tiled, step)
            for optimizer in optimizers:
                optimizer.step()
    assert (tiled[0] * 2.5).half().dtype == torch.float16
    last = layout.tiles[2].region
    assert torch.equal(tiled[1].local_tiles[0], plain[1].detach()[3:8][:, list(last.dims[1])])
    for call in (tiled[0].norm, tiled[0].full_tensor, tiled[0].sum):
        with pytest.raises(ParameterError, match="process group"):
            call()


def test_retile_keeps_identity_hooks_gradient_and_frees_storage() -> None:
    module = nn.Linear(6, 8, bias=False)
    tied = module.tied = module.weight
    tied.note = "kept"
    calls: list[str] = []
    handle = tied.register_hook(lambda grad: calls.append(type(grad).__name__))
    tied.register_post_accumulate_grad_hook(lambda p: calls.append(str(p is tied)))
    module(torch.randn(2, 6)).sum().backward()
    whole, grad, address = tied.detach().clone(), tied.grad.clone(), id(tied)
    storage = weakref.ref(tied.untyped_storage())
    retile_(tied, uneven())
    gc.collect()
    assert storage() is None and all(t.untyped_storage().nbytes() == t.numel() * 4 for t in tied.local_tiles)
    assert module.weight is module.tied is tied and id(tied) == address and tied.note == "kept"
    assert isinstance(tied, nn.Parameter) and tied.is_leaf and tied.grad_fn is None and tied.requires_grad
    assert dict(module.named_parameters()) == {"weight": tied} and tied.shape == (8, 6)
    assert torch.equal(tied.grad.full_tensor(), grad)
    module.load_state_dict({"weight": whole * 2, "tied": whole * 2})
    assert torch.equal(tied.full_tensor(), whole * 2)
    tied.data = whole
    assert torch.equal(tied.data.full_tensor(), whole) and isinstance(tied.data, TiledTensor)
    calls.clear()
    tied.grad = None
    tied.square().sum().backward()
    assert torch.equal(tied.grad.full_tensor(), whole * 2) and calls == ["TiledTensor", "True"]
    retile_(tied, scattered())
    handle.remove()
    tied.square().sum().backward()
    assert calls == ["TiledTensor", "True", "True"] and tied.grad.tiling == scattered()
    assert "TiledTensor(shape=[8, 6]" in repr(tied) and "[1:3,5:7, 1,3,5]@rank0:cpu (local)" in f"{tied}"


def test_retile_frozen_meta_and_wrong_arguments() -> None:
    frozen = retile_(nn.Parameter(torch.ones(8, 6, dtype=torch.int8), requires_grad=False), uneven())
    assert not frozen.requires_grad and frozen.dtype == torch.int8
    empty = retile_(nn.Parameter(torch.empty(8, 6, device="meta")), uneven())
    with torch.no_grad():
        empty.copy_(torch.ones(8, 6))
    assert torch.equal(empty.full_tensor(), torch.ones(8, 6))
    referenced = nn.Parameter(torch.ones(8, 6))
    reference = weakref.ref(referenced)
    for wrong in (referenced, torch.ones(8, 6), nn.Parameter(torch.ones(2)), nn.UninitializedParameter()):
        with pytest.raises(ParameterError):
            retile_(wrong, uneven())
    assert type(reference()) is nn.Parameter


def test_losses_from_before() -> None:
    parameter = nn.Parameter(torch.ones(8, 6))
    saved, linear, finished = parameter.square().sum(), (parameter * 2).sum(), parameter.exp().sum()
    finished.backward()
    with pytest.raises(ParameterError, match="losses computed"):
        retile_(parameter, uneven())
    assert type(parameter) is nn.Parameter
    del saved
    retile_(parameter, uneven())
    with pytest.raises(RuntimeError, match="swap_tensors"):
        linear.backward()
    parameter.grad = None
    parameter.square().sum().backward()
    assert torch.equal(parameter.grad.full_tensor(), torch.full((8, 6), 2.0))


class Token(torch.autograd.Function):
    """Stands for a distributed forward pass: parameters in, a number out, tiled gradients back."""

    @staticmethod
    def forward(ctx: object, grads: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.grads = grads
        return torch.zeros(())

    @staticmethod
    def backward(ctx: object, outgoing: torch.Tensor) -> tuple[object, ...]:
        return (None, *(grad * outgoing for grad in ctx.grads))


def test_autograd_accumulates_tiled_gradients() -> None:
    plain, (parameter,) = pair([uneven()])
    retile_(parameter, uneven())
    whole = torch.randn(8, 6, dtype=torch.float64)
    grad = from_full(whole, uneven())
    for times in (1, 2):
        Token.apply([grad], parameter).backward()
        assert isinstance(parameter.grad, TiledTensor)
        assert torch.equal(parameter.grad.full_tensor(), whole * times)
    assert torch.equal(grad.full_tensor(), whole)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.zero_grad(set_to_none=False)
    assert not parameter.grad.full_tensor().any()
    optimizer.zero_grad(set_to_none=True)
    assert parameter.grad is None
    (found,) = torch.autograd.grad(Token.apply([grad], parameter), [parameter])
    assert isinstance(found, TiledTensor) and torch.equal(found, grad)
    parameter.grad = grad
    assert parameter.grad is grad
    loss = Token.apply([grad], parameter) + parameter.norm()
    loss.backward()
    plain[0].grad = whole * 2
    plain[0].norm().backward()
    torch.testing.assert_close(parameter.grad.full_tensor(), plain[0].grad)


# --- several processes ----------------------------------------------------------------------------------------


def distributed_layouts(world: int) -> list[TiledLayout]:
    last = world - 1
    return [
        uneven(ranks=(last, 0, 1)),
        rows((7,), (2, 3), ranks=(1, 0, last)),
        TiledLayout.whole((3, 3), rank=last),
        TiledLayout.whole((), rank=1),
        TiledLayout.whole((3, 5)),
    ]


def check_distributed(rank: int, world: int) -> None:
    group = dist.group.WORLD
    for name, foreach, order in (("adamw", None, 2.0), ("sgd", True, float("inf")), ("adagrad", None, None)):
        layouts = distributed_layouts(world)
        plain, tiled = pair(layouts)
        for t in tiled:  # taken over while every process still has everything, before a plan exists
            retile_(t, TiledLayout.whole(t.shape))
        optimizers = [OPTIMIZERS[name](ps, foreach=foreach) for ps in (plain, tiled)]
        for step in range(5):
            if step in (0, 3):  # the second time is a change of plan
                layouts = layouts if step == 0 else [rows((8, 6), (5,), ranks=(0, 1)), *layouts[1:]]
                for t, layout in zip(tiled, layouts, strict=True):
                    retile_(t, layout, rank=rank, process_group=group)
                    assert len(t.local_tiles) == len(layout.local(rank))
            set_grads(plain, tiled, step)
            if order is not None:
                norms = [clip_grad_norm_(ps, 0.5, norm_type=order, foreach=foreach) for ps in (plain, tiled)]
                torch.testing.assert_close(norms[1], norms[0], rtol=1e-12, atol=0)
                everyone: list[object] = [None] * world
                dist.all_gather_object(everyone, norms[1].item().hex())
                assert len(set(everyone)) == 1, everyone
            for optimizer in optimizers:
                optimizer.step()
        for p, t in zip(plain, tiled, strict=True):
            if order is None:
                assert torch.equal(t.full_tensor(), p)
            torch.testing.assert_close(t.full_tensor(), p.detach(), rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(t.sum(), p.detach().sum())
            assert torch.equal(t, t.full_tensor()) and not torch.equal(t, t.full_tensor() + 1)
        assert torch.equal(tiled[2].norm(), tiled[2].full_tensor().norm())  # one tile: its own bits
    bits = torch.arange(48, dtype=torch.bfloat16).reshape(8, 6)
    assert torch.equal(from_full(bits, uneven(ranks=(1, 0, 1)), rank, group).full_tensor(), bits)
    if rank == 0:  # only one rank sees the infinity; all must skip
        tiled[0].grad.local_tiles[0][0, 0] = float("inf")
    scaler, before = torch.amp.GradScaler("cpu"), tiled[0].full_tensor()
    scaler.scale(torch.zeros(()))
    scaler.step(torch.optim.SGD(tiled, lr=1.0))
    scaler.update()
    assert torch.equal(tiled[0].full_tensor(), before) and scaler.get_scale() == 2.0**15


KEPT: list[object] = []


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
        check_distributed(rank, world)
        # A parameter that lives until the end must not keep the group: the process would abort at exit.
        KEPT.append(from_full(torch.ones(8, 6), uneven((0, 1, 0)), rank, dist.group.WORLD))
        dist.destroy_process_group()
        gc.collect()
        with pytest.raises(ParameterError, match="destroyed"):
            KEPT[0].norm()
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        raise


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.timeout(150)
def test_real_processes_agree_with_one(world: int, tmp_path: Path) -> None:
    context = forking()
    processes = [context.Process(target=run_rank, args=(rank, world, str(tmp_path))) for rank in range(world)]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + 120
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            if any(p.exitcode for p in processes):
                break
            time.sleep(0.05)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join(10)
    reports = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.txt")))
    assert codes == [0] * world, reports or "a rank did not finish in time"
