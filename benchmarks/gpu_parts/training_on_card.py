"""What training on a card has beside the model: precision, draws, statistics, optimizers, streams, errors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from gpu_parts.harness import Figures, Setting, Skipped
from gpu_parts.models import (
    Batch,
    check,
    cut_by_hand,
    difference,
    exact_products,
    parted_training,
    partition,
    pictures,
    plain_training,
    refusal,
    sgd,
    words,
)
from graphpart.errors import DeviceOutOfMemoryError
from graphpart.runtime.kernels.random import StepRandom
from graphpart.runtime.kernels.random_kernels import attention

TOLERANCE = 2e-4
NARROW = 5e-2
"""The same in bfloat16 and float16."""
BIAS = 0.1
"""The scale of what began at zero, such as biases, and holds little more than rounded gradients."""


# --- precision ----------------------------------------------------------------------------------------------------


def autocast(setting: Setting) -> Figures:
    """Calls and fused steps under autocast, against the plain model under the same."""
    model, batch = words(setting)
    figures = {}
    dtypes = (torch.bfloat16,) if setting.device == "cpu" else (torch.bfloat16, torch.float16)
    for dtype in dtypes:
        with torch.autocast(setting.device, dtype):
            expected = plain_training(model, batch)
            parted = partition(model, setting.workers(2), strategy="layer", num_microbatches=2)
            found = parted_training(parted, batch)
            assert str(dtype).removeprefix("torch.") in {w.dtype for w in parted.last_step.program.wires}
            report = partition(model, setting.workers(2), strategy="feature").verify(**batch)
        figures[f"{dtype}, a call"] = max(report.differences.values())
        figures[f"{dtype}, steps"] = check(str(dtype), difference(found, expected, BIAS), NARROW)
    return figures


def scaler(setting: Setting) -> Figures:
    """A GradScaler: in fused steps and in the user's own loop, and a step that it skips."""
    dtype = torch.float16 if setting.device == "cuda" else torch.bfloat16
    model, batch = words(setting)
    figures: dict[str, float] = {}

    def eager(run: nn.Module, scale: torch.amp.GradScaler) -> dict[str, Tensor]:
        optimizer = sgd(run.parameters())
        loss = torch.zeros(())
        for _ in range(2):
            with torch.autocast(setting.device, dtype):
                loss = run(**batch)
            scale.scale(loss).backward()
            scale.step(optimizer)
            scale.update()
            optimizer.zero_grad()
        return {**run.state_dict(), "loss": loss.detach()}

    def new() -> torch.amp.GradScaler:
        return torch.amp.GradScaler(setting.device, init_scale=2.0**10)

    expected = eager(copy.deepcopy(model), new())
    choices = {"strategy": "layer", "num_microbatches": 2}
    loop = eager(partition(model, setting.workers(2), **choices), new())
    figures["own loop"] = check("own loop", difference(loop, expected, BIAS), NARROW)
    with torch.autocast(setting.device, dtype):
        fused = parted_training(partition(model, setting.workers(2), **choices), batch, scaler=new())
    figures["fused steps"] = check("fused steps", difference(fused, expected, BIAS), NARROW)

    parted, scale = partition(model, setting.workers(2), **choices), torch.amp.GradScaler(setting.device)
    before = copy.deepcopy(parted.state_dict())
    with torch.no_grad():
        next(parted.parameters()).grad = torch.full_like(next(parted.parameters()), float("inf"))
    parted.train_step(optimizer=sgd(parted.parameters()), scaler=scale, **batch)
    assert difference(parted.state_dict(), before) == 0.0, "a step with an infinite gradient was not skipped"
    assert scale.get_scale() < 2.0**16
    return figures


# --- draws and statistics -----------------------------------------------------------------------------------------


def dropout(setting: Setting) -> Figures:
    """The same seed and plan give the same masks; so do a rerun, other schedules, and every place a layer runs."""
    exact_products()
    model, batch = words(setting, dropout=0.3)

    def train(workers: int, **choices: Any) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return parted_training(partition(model, setting.workers(workers), num_microbatches=2, **choices), batch)

    expected = train(1, strategy="single")
    figures = {}
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "layer, 2 workers": (2, {"strategy": "layer", "schedule": "1f1b"}),
        "run again": (1, {"strategy": "single", "recompute": ["blocks.*"]}),
        "the same again": (2, {"strategy": "layer", "schedule": "1f1b"}),
    }
    for name, (workers, choices) in cases.items():
        figures[name] = check(name, difference(train(workers, **choices), expected), TOLERANCE)
    torch.manual_seed(6)
    other = parted_training(partition(model, setting.workers(1), strategy="single", num_microbatches=2), batch)
    assert difference(other, expected) > 1e-3, "another seed gave the same masks"
    return figures


def fused_attention(setting: Setting) -> Figures:
    """Attention with dropout is torch's own kernel under the seed of the key, from any thread."""
    from graphpart.runtime.kernels import random_kernels

    before, random_kernels.FUSED_ATTENTION = random_kernels.FUSED_ATTENTION, frozenset({setting.device})
    try:
        return _fused_attention(setting)
    finally:
        random_kernels.FUSED_ATTENTION = before


def _fused_attention(setting: Setting) -> Figures:
    dtypes = (torch.float32,) if setting.device == "cpu" else (torch.float32, torch.bfloat16)
    shape = (2, 4, setting.size(256, 8), setting.size(64, 8))
    device = torch.device(setting.place)
    checked = 0
    for dtype in dtypes:
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        state = _generator_state(device)

        def run(call: Callable[..., Tensor], q: Tensor = q, k: Tensor = k, v: Tensor = v) -> tuple[Tensor, ...]:
            out = call(q, k, v)
            return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

        keys, found = range(4), {}

        def work(key: int, run: Any = run, found: dict[int, Any] = found) -> None:
            found[key] = run(lambda *of: attention(StepRandom(1)(key), *of, dropout_p=0.2, is_causal=True))

        threads = [threading.Thread(target=work, args=(key,)) for key in keys]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(_generator_state(device), state), "the default generator is not as it was"
        for key in keys:
            torch.manual_seed(StepRandom(1)(key)._seed)
            expected = run(lambda *of: F.scaled_dot_product_attention(*of, None, 0.2, True))
            assert torch.equal(found[key][0], expected[0]), f"{dtype}: another mask than torch's under the same seed"
            for mine, theirs in zip(found[key][1:], expected[1:], strict=True):
                scale = float(theirs.abs().max())
                check(
                    f"{dtype}", float((mine - theirs).abs().max()) / scale, 1e-5 if dtype == torch.float32 else NARROW
                )
            checked += 1
    return {"draws compared": checked}


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def batch_norm(setting: Setting) -> Figures:
    """Statistics over all microbatches, and by microbatch."""
    exact_products()
    model, batch = pictures(setting)
    expected = plain_training(model, batch)
    figures = {}
    for strategy in ("layer", "batch"):
        parted = partition(model, setting.workers(2), strategy=strategy, num_microbatches=2)
        name = f"{strategy}, exact"
        figures[name] = check(name, difference(parted_training(parted, batch), expected), TOLERANCE)
    by_part = partition(model, setting.workers(2), strategy="layer", num_microbatches=2, batch_norm="microbatch")
    found = parted_training(by_part, batch, steps=1)
    assert int(found["features.1.num_batches_tracked"]) == 1 and all(map(_is_finite, found.values()))
    return figures


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


# --- optimizers ---------------------------------------------------------------------------------------------------


def optimizers(setting: Setting) -> Figures:
    """AdamW plain, foreach and fused, with and without clipping, over parameters that are whole and cut."""
    exact_products()
    model, batch = words(setting)
    beside = ["cuda:0", "cpu:0"] if setting.device == "cuda" else ["cpu:0", "cpu:1"]
    figures: dict[str, float | str] = {}
    for devices, kind in ((setting.workers(2), "whole"), (beside, "cut")):
        for name in ("plain", "foreach", "fused"):
            flags = {"foreach": name == "foreach", "fused": name == "fused"}

            def adamw(parameters: Any, flags: dict[str, bool] = flags) -> torch.optim.Optimizer:
                return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, **flags)

            what = f"{kind}, {name}"
            parted = partition(model, devices, strategy=cut_by_hand())
            if kind == "cut" and name == "fused" and setting.device == "cuda":  # parts on two devices
                figures[what] = refusal(lambda parted=parted, adamw=adamw: parted_training(parted, batch, adamw))
                continue
            found = parted_training(parted, batch, adamw)
            figures[what] = check(what, difference(found, plain_training(model, batch, adamw)), TOLERANCE)
    parted = partition(model, beside, strategy=cut_by_hand())
    step = parted.train_step(optimizer=sgd(parted.parameters()), clip_grad_norm=1e-3, **batch)
    plain = copy.deepcopy(model)
    plain(**batch).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e-3))
    figures["norm of cut gradients"] = check("norm", abs(float(step.grad_norm) - norm) / norm, TOLERANCE)
    return figures


# --- streams and threads ------------------------------------------------------------------------------------------


@contextmanager
def _side_stream(setting: Setting) -> Iterator[None]:
    if setting.device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def streams(setting: Setting) -> Figures:
    """Calls and steps on a stream of the caller's, behind what still computes their inputs; two models at once."""
    exact_products()
    model, batch = words(setting)
    expected = plain_training(model, batch)
    figures = {}
    parted = partition(model, setting.workers(2), strategy="layer", num_microbatches=2)
    parted.prepare_step(**batch)
    with _side_stream(setting):
        late = _late(batch, setting)
        figures["fused steps"] = check("fused steps", difference(parted_training(parted, late), expected), TOLERANCE)
    parted, results = partition(model, setting.workers(2), strategy="layer"), {}
    with _side_stream(setting):
        optimizer = sgd(parted.parameters())
        for _ in range(2):
            loss = parted(**_late(batch, setting))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results = {**parted.state_dict(), "loss": loss.detach()}
    figures["own loop"] = check("own loop", difference(results, expected), TOLERANCE)

    found: dict[int, dict[str, Tensor]] = {}
    twins = [partition(model, setting.workers(2), strategy="layer") for _ in range(2)]

    def work(index: int) -> None:
        with _side_stream(setting):
            found[index] = parted_training(twins[index], batch)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        figures[f"model {i} of two"] = check("two at once", difference(found[i], expected), TOLERANCE)
    return figures


def _late(batch: Batch, setting: Setting) -> Batch:
    """The batch, as the result of work that the current stream is still busy with."""
    if setting.device == "cuda":
        torch.cuda._sleep(20_000_000)
    return {name: tensor.clone() for name, tensor in batch.items()}


# --- errors -------------------------------------------------------------------------------------------------------


class _Greedy(nn.Module):
    """A layer whose result is far larger than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y.unsqueeze(0) * y.unsqueeze(1)).sum()


def errors(setting: Setting) -> Figures:
    """Memory that runs out is told with operator, device and forecast; the card works on afterwards."""
    if setting.device == "cpu":
        with torch.no_grad():
            return {"loss": float(partition(_Greedy(), setting.workers(1))(torch.ones(8, 4)))}
    x = torch.ones(1 << 15, 4, device="cuda:0")  # 2^15 x 2^15 x 4 floats are 16 GiB
    torch.cuda.set_per_process_memory_fraction(0.1)
    # The planner would refuse: it is told that there is room.
    device = gp.Device("cuda:0", "card", {"float32": 1e13}, 1 << 40, 1e12)
    cluster = gp.Cluster((device,), gp.Link(1e-5, 1e10))
    try:
        gp.partition(_Greedy().cuda(), cluster, deadline_s=30.0)(x)
    except DeviceOutOfMemoryError as error:
        said = str(error)
    else:
        raise Skipped("nothing ran out of memory")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "cuda:0" in said and "forecast" in said and "measured peak" in said, said
    model, batch = words(setting)
    parted = partition(model, setting.workers(2), strategy="layer")
    parted.verify(**batch)
    return {"out of memory": said[:120]}
