"""Every model of the zoo gives on several workers and microbatches what it gives alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp
from graphpart.ir.graph import Ref
from graphpart.module.losses import default_loss
from graphpart.trace import Traced, trace
from tests.helpers.traces import traced_as
from tests.helpers.zoo import MODELS, Sample

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

SAMPLE_DIMS: dict[str, dict[str, int | None]] = {
    "encoder_stack": {"args[0]": 1},  # sequence first
    "gru": {"args[1]": 1},
    "transformer": {"args[2]": None},  # a mask of the target's positions
}
ALL = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MODELS]
"""The tests of one model run in one process, one after the other: its trace is made once for each variant."""

BFLOAT16 = ("bert", "llama", "t5", "mixtral", "vit", "unet", "lora")
AUTOCAST = ("gpt2", "whisper", "clip", "resnet", "transformer", "lstm")


@functools.lru_cache(maxsize=4)
def prepared(name: str, variant: str) -> tuple[Sample, Traced]:
    """A model with its trace, which takes most of a test's time and is the same for any number of workers."""
    sample = MODELS[name](4 if variant == "eval" else 7)
    if variant == "bfloat16":
        sample = Sample(*(_in_bfloat16(part) for part in sample))
    sample.model.train(variant != "eval")
    with autocast(variant):
        return sample, trace(sample.model, sample.args, sample.kwargs, sample_dims=SAMPLE_DIMS.get(name))


def _in_bfloat16(part: Any) -> Any:
    if isinstance(part, nn.Module):
        return part.to(torch.bfloat16)
    cast: Callable[[Tensor], Tensor] = lambda x: x.to(torch.bfloat16) if x.is_floating_point() else x  # noqa: E731
    return torch.utils._pytree.tree_map_only(Tensor, cast, part)


def autocast(variant: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if variant == "autocast" else nullcontext()


@functools.lru_cache(maxsize=4)
def without_gradient(name: str, variant: str) -> frozenset[str]:
    """Parameters that get no gradient from the plain model."""
    sample, _ = prepared(name, variant)
    with autocast(variant):
        loss = default_loss(sample.model(*sample.args, **sample.kwargs))
    names, parameters = zip(*((n, p) for n, p in sample.model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    frozen = {n for n, p in sample.model.named_parameters() if not p.requires_grad}
    return frozenset(n for n, g in zip(names, gradients, strict=True) if g is None) | frozen


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    before = [b.clone() for b in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)


def check(
    name: str, workers: int, num_microbatches: int, variant: str, tolerance: float, strategy: str = "layer"
) -> gp.PartitionedModule:
    sample, traced = prepared(name, variant)
    with traced_as(traced), autocast(variant):
        parted = gp.partition(sample.model, workers, strategy=strategy, num_microbatches=num_microbatches)
        parted.verify(*sample.args, **sample.kwargs).check(tolerance)
        with keeping_buffers(sample.model):
            default_loss(parted(*sample.args, **sample.kwargs)).backward()
    found = {n for n, g in parted.grad_dict().items() if g is None}
    sample.model.zero_grad()
    with keeping_buffers(sample.model):
        assert found == without_gradient(name, variant)
    return parted


def has_bfloat16_cells() -> bool:
    """Whether torch runs an LSTM in bfloat16 here: oneDNN does so only on some processors."""
    try:
        with autocast("autocast"):
            torch.nn.LSTM(8, 8)(torch.zeros(3, 2, 8))
    except RuntimeError:
        return False
    return True


def num_busy(parted: gp.PartitionedModule) -> int:
    """Devices that run something."""
    return len({s.device for s in parted.plan.program.segments})


def in_turn(choices: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Every model with every one of the choices, and of the others one in turn: every pair occurs."""
    return [
        pytest.param(name, choice, others[(i + j) % len(others)], marks=pytest.mark.xdist_group(name))
        for i, name in enumerate(MODELS)
        for j, choice in enumerate(choices)
    ]


@pytest.mark.parametrize(("name", "workers", "num_microbatches"), in_turn((1, 2, 3, 4), (1, 4)), scope="module")
def test_training(name: str, workers: int, num_microbatches: int) -> None:
    assert num_busy(check(name, workers, num_microbatches, "train", tolerance_of(name))) == workers


def tolerance_of(name: str) -> float:
    return 5e-2 if name == "mixed_dtypes" else 1e-5


SPLITS = ("batch", "feature", "hybrid", "free")


@pytest.mark.parametrize(("name", "strategy", "workers"), in_turn(SPLITS, (2, 3, 4)), scope="module")
def test_splits(name: str, strategy: str, workers: int) -> None:
    parted = check(name, workers, 1, "train", tolerance_of(name), strategy)
    if strategy in ("batch", "feature"):
        assert num_busy(parted) == workers


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(name, strategy, marks=pytest.mark.xdist_group(name))
        for i, name in enumerate(MODELS)
        for strategy in SPLITS[i % 2 :: 2]
    ],
    scope="module",
)
def test_splits_in_microbatches(name: str, strategy: str) -> None:
    """Seven samples in three parts, and cut in space as well; every model by two of the strategies."""
    check(name, 2, 3, "train", tolerance_of(name), strategy)


@pytest.mark.parametrize("name", ALL, scope="module")
def test_eval(name: str) -> None:
    """With microbatches of a single sample."""
    check(name, 3, 4, "eval", tolerance_of(name))


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in BFLOAT16])
def test_bfloat16(name: str, num_microbatches: int) -> None:
    check(name, 2, num_microbatches, "bfloat16", 5e-2)


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in AUTOCAST])
def test_autocast(name: str, num_microbatches: int) -> None:
    if name == "lstm" and not has_bfloat16_cells():
        pytest.skip("torch has no LSTM of bfloat16 for this processor")
    check(name, 2, num_microbatches, "autocast", 5e-2)


@pytest.mark.parametrize("strategy", SPLITS)
def test_widths_that_do_not_divide(strategy: str) -> None:
    """12 heads and 50257 words on 5 workers, 7 samples."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=12, n_embd=96, n_positions=8, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(0, 50257, (7, 8))
    parted = gp.partition(model, 5, strategy=strategy)
    parted.verify(ids, labels=ids).check(1e-5)
    if strategy == "feature":
        graph, tiles = parted.plan.graph, parted.plan.placement.tiles
        heads = next(op.name for op in graph.operators if "scaled_dot_product" in op.target)
        words = next(op.name for op in graph.operators if op.module_path == "lm_head")
        assert sorted(len(t.axes["b1"]) for t in tiles[heads]) == [2, 2, 2, 3, 3]
        assert sorted(len(t.axes["n"]) for t in tiles[words]) == [10051, 10051, 10051, 10052, 10052]


@pytest.mark.parametrize(("name", "sums"), [("gpt2", 4), ("bert", 4), ("llama", 4), ("t5", 10)])
def test_M1_two_all_reduces_a_layer_each_way_at_run_time(name: str, sums: int) -> None:
    """Two layers of two sums each; T5's two decoder layers have three. The last layer's are all wanted here."""
    parted = check(name, 2, 1, "train", 1e-5, "feature")
    step, graph = parted.last_step, parted.plan.graph
    assert step is not None
    in_layers = [c for c in step.collectives if c.kind == "all-reduce" and graph.producer[c.value].target in PRODUCTS]
    forward = set(range(parted.plan.program.num_messages))
    assert sum(forward.issuperset(c.tags) for c in in_layers) == sums
    assert sum(forward.isdisjoint(c.tags) for c in in_layers) == sums
    # No other exchange is larger than one of these: scores and vocabularies stay where they are.
    sizes = {c.size_bytes for c in in_layers}
    logits = [graph.values[ref.name] for ref in graph.outputs if isinstance(ref, Ref)]
    others = [c for c in step.collectives if c not in in_layers and c.value not in {v.name for v in logits}]
    assert all(c.size_bytes <= max(sizes) for c in others if c.value not in graph.source)


PRODUCTS = ("aten.linear.default", "aten.addmm.default")
