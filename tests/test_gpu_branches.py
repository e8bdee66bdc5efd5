"""What workers do on GPUs alone, as far as a CPU can show it: fused attention with dropout, streams, messages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from graphpart.cost.memory.fused_attention import with_fused_attention
from graphpart.runtime.executors import process_group, threads
from graphpart.runtime.kernels import random_kernels
from graphpart.runtime.kernels.random import StepRandom
from graphpart.runtime.kernels.random_kernels import attention
from graphpart.trace import trace

P = 0.3


class Attention(nn.Module):
    """Two layers of causal attention with dropout, eight wide."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in layer(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, dropout_p=P, is_causal=True).transpose(1, 2).flatten(2)
        return x.square().mean()


def operands(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, 5, 4, generator=generator, requires_grad=True) for _ in range(3)]


def gradients(run: Callable[..., Tensor], seed: int) -> list[Tensor]:
    given = operands(seed)
    out = run(*given)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), given)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on a GPU."""
    monkeypatch.setattr(random_kernels, "FUSED_ATTENTION", frozenset({"cpu"}))


@pytest.mark.usefixtures("fused")
def test_fused_attention_draws_as_torch_does_from_the_seed_of_the_key() -> None:
    draw = StepRandom(3)(5)
    before = torch.get_rng_state()
    found = gradients(lambda q, k, v: attention(draw, q, k, v, dropout_p=P, is_causal=True), 0)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's own numbers are what they would have been
    with torch.random.fork_rng():
        torch.manual_seed(draw._seed)
        expected = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, P, True), 0)
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("fused")
def test_workers_of_one_device_do_not_disturb_each_others_draws() -> None:
    step = StepRandom(7)

    def work(key: int) -> list[Tensor]:
        return gradients(lambda q, k, v: attention(step(key), q, k, v, dropout_p=P), key)

    keys = range(8)
    alone = [work(key) for key in keys]
    assert not torch.equal(work(0)[0], gradients(lambda q, k, v: attention(step(1), q, k, v, dropout_p=P), 0)[0])
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(work, keys))
            assert all(
                torch.equal(a, b) for x, y in zip(together, alone, strict=True) for a, b in zip(x, y, strict=True)
            )


@pytest.mark.usefixtures("fused")
def test_an_error_in_the_kernel_puts_the_generator_back() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        attention(StepRandom(0)(1), torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3), dropout_p=P)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("options", [{"recompute": ["layers.*"]}, {"strategy": "layer"}], ids=["recompute", "layer"])
def test_a_model_with_fused_attention_draws_by_key(options: dict[str, Any]) -> None:
    """What runs again draws as it did, and where a layer runs makes no difference."""
    torch.manual_seed(0)
    model, x = Attention().train(), torch.randn(2, 5, 8)

    def step(devices: int, **options: Any) -> list[Tensor]:
        parted = gp.partition(copy.deepcopy(model), devices, **options)
        torch.manual_seed(1)
        loss = parted(x)
        loss.backward()
        return [loss.detach(), *(p.grad for p in parted.parameters())]

    assert all(map(torch.equal, step(2, **options), step(1, strategy="single", recompute="none")))


def test_a_plan_for_gpus_counts_fused_attention() -> None:
    x = torch.randn(2, 50, 8)
    graph = trace(Attention().train(), (x,), {}).graph
    plans = {devices: gp.plan(Attention().train(), devices, (x,), strategy="single") for devices in ("1xH100", "1xCPU")}
    kept = {
        devices: sum(op.saved_extra_bytes for op in plan.graph.operators if "dot_product" in op.target)
        for devices, plan in plans.items()
    }
    assert kept["1xH100"] == 2 * 2 * 2 * 50 * 4  # a float32 a layer, sample, head and row
    assert kept["1xCPU"] >= 2 * 2 * 2 * 50 * 50 * 5  # weights in float32 and their mask
    mixed = gp.api.find_cluster(["cuda:0", "cpu:0"])
    assert with_fused_attention(graph, mixed) is graph


def test_workers_queue_where_their_caller_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker enters the caller's stream of every GPU, its own last, so that it is the current device."""

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

    entered: list[torch.device] = []

    @contextmanager
    def stream(given: Stream) -> Iterator[None]:
        entered.append(given.device)
        yield
        entered.append(given.device)

    first, second, host = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    streams = threads._current_streams([first, host, first, second])
    assert [found.device for found in streams] == [first, second]
    for own, order in ((first, [second, first]), (second, [first, second]), (host, [first, second])):
        with threads._on_streams(streams, own):
            assert entered == order
        assert entered == order + order[::-1]
        entered.clear()


@pytest.mark.parametrize(("backends", "is_apart"), [("cuda:nccl", True), ("cpu:gloo,cuda:nccl", False)])
def test_messages_go_by_tag_where_nccl_would_take_them_in_order(
    backends: str, is_apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Group:
        pass

    made = [Group()]
    monkeypatch.setattr(process_group.dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(process_group.dist, "new_group", lambda backend: made[0] if backend == "gloo" else None)
    find = process_group.group_for_messages()
    assert find() is (made[0] if is_apart else None)
    made.clear()
    assert find() is None  # a destroyed group is not kept
