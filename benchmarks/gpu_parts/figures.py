"""What a step costs on a card: time and memory beside eager's, and beside what was forecast."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from overhead import MODELS, Batch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import graphpart as gp
from gpu_parts.harness import Figures, Setting
from gpu_parts.meters import peak_bytes, seconds, wait
from gpu_parts.models import DEADLINE_S, partition, words
from graphpart.runtime.kernels.random import StepRandom
from graphpart.runtime.kernels.random_kernels import attention
from graphpart.trace.randomness import attention_with_dropout

MIB = 2**20


def _tiny(name: str) -> tuple[nn.Module, Batch]:
    """The same kinds of models, small."""
    labels = torch.zeros(2, dtype=torch.int64)
    if name == "gpt2":
        config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=8, use_cache=False)
        ids = torch.randint(0, 50, (2, 8))
        return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids.clone()}
    if name == "bert":
        sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        ids = torch.randint(0, 50, (2, 8))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=8, **sizes)), given
    small = ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, num_labels=10)
    return ResNetForImageClassification(small), {"pixel_values": torch.randn(2, 3, 32, 32), "labels": labels}


def _made(name: str, setting: Setting, dtype: torch.dtype) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model, batch = _tiny(name) if setting.tiny else MODELS[name](32)
    given = {key: (x.to(dtype) if x.is_floating_point() else x).to(setting.place) for key, x in batch.items()}
    return model.train().to(setting.place, dtype), given


def _step_of(model: Any, batch: Batch) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def one_device(setting: Setting, name: str) -> Figures:
    """One worker beside eager; memory at the peak; the step beside its forecast, from data sheets and measured."""
    figures: dict[str, float] = {}
    dtypes = {"float32": torch.float32} if setting.tiny else {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for label, dtype in dtypes.items():
        model, batch = _made(name, setting, dtype)
        eager = _step_of(copy.deepcopy(model), batch)
        eager_peak = peak_bytes(setting, lambda eager=eager: [eager(), eager()])
        del eager
        parted = gp.partition(copy.deepcopy(model), setting.workers(1), strategy="single", deadline_s=DEADLINE_S)
        ours = _step_of(parted, batch)
        peak = peak_bytes(setting, lambda ours=ours: [ours(), ours()])
        own = sum(p.numel() * p.element_size() for p in model.parameters())
        fused = torch.optim.AdamW(parted.parameters(), lr=1e-5)
        steps: dict[str, Callable[[], object]] = {
            "eager": _step_of(copy.deepcopy(model), batch),
            "ours": ours,
            "fused": functools.partial(parted.train_step, optimizer=fused, **batch),
        }
        times = seconds(setting, steps, setting.size(8, 1))
        figures |= {f"{label}: seconds, {kind}": time_s for kind, time_s in times.items()}
        figures[f"{label}: ours / eager"] = times["ours"] / times["eager"]
        if setting.device == "cuda":
            # The copy that both were made of lies there all the time.
            figures[f"{label}: peak MiB, eager"] = (eager_peak - own) / MIB
            figures[f"{label}: peak MiB, ours"] = (peak - own) / MIB
            figures[f"{label}: peak MiB, forecast"] = parted.plan.memory.peak_bytes / MIB
        plan = parted.last_step.plan
        measured = gp.calibrate(parted, optimizer=fused, num_rounds=setting.size(3, 1), **batch)
        figures[f"{label}: data sheet / fused"] = gp.simulate(plan).makespan_s / times["fused"]
        figures[f"{label}: calibrated / fused"] = gp.simulate(plan, measured).makespan_s / times["fused"]
    return figures


def attention_with_dropout_on_card(setting: Setting) -> Figures:
    """Attention with dropout forward and backward: ours, torch's, and written out."""
    shape = (setting.size(8, 1), setting.size(12, 2), setting.size(2048, 16), setting.size(64, 4))
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    operands = [torch.randn(shape, device=setting.place, dtype=dtype, requires_grad=True) for _ in range(3)]
    draw = StepRandom(1)

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out.sum(), operands)

    steps: dict[str, Callable[[], object]] = {
        "ours": lambda: backward(attention(draw(2), *operands, dropout_p=0.1, is_causal=True)),
        "torch": lambda: backward(F.scaled_dot_product_attention(*operands, None, 0.1, True)),
        "written out": lambda: backward(attention_with_dropout(*operands, None, 0.1, True)),
    }
    figures: dict[str, float] = {}
    for name, time_s in seconds(setting, steps, setting.size(10, 1)).items():
        figures[f"seconds, {name}"] = time_s
        if setting.device == "cuda":
            figures[f"peak MiB, {name}"] = peak_bytes(setting, steps[name]) / MIB
    if setting.device == "cuda":
        assert figures["peak MiB, ours"] < figures["peak MiB, written out"] / 4, "attention keeps its weights"
    return figures


def workers_of_one_card(setting: Setting) -> Figures:
    """Several workers of one card: what cutting costs there, messages by reference, and copies to and from the host."""
    model, batch = words(setting)
    sizes = (1, 2) if setting.tiny else (1, 2, 4)
    steps: dict[str, Callable[[], object]] = {}
    for count in sizes:
        parted = partition(model, setting.workers(count), strategy="layer", num_microbatches=2)
        optimizer = torch.optim.SGD(parted.parameters(), lr=1e-3)
        steps[f"{count} workers"] = functools.partial(parted.train_step, optimizer=optimizer, **batch)
    figures = {f"seconds, {name}": time_s for name, time_s in seconds(setting, steps, setting.size(8, 1)).items()}
    values = torch.empty(setting.size(1 << 26, 1 << 10), device=setting.place)
    shared = values.to(setting.place)
    assert shared.data_ptr() == values.data_ptr(), "a message between workers of one card is copied"
    if setting.device == "cuda":
        host, pinned = values.cpu(), values.cpu().pin_memory()
        ways: dict[str, Callable[[], object]] = {
            "to the host": values.cpu,
            "from the host": lambda: host.to("cuda:0"),
            "from pinned memory": lambda: pinned.to("cuda:0"),
            "within the card": values.clone,
        }
        size_bytes = values.numel() * 4
        for name, time_s in seconds(setting, ways, 5).items():
            figures[f"GB/s, {name}"] = size_bytes / time_s / 1e9
        cluster = gp.api.find_cluster(["cuda:0", "cpu:0"])
        figures["GB/s, to the host by data sheet"] = cluster.link(0, 1).bandwidth_bytes_per_s / 1e9
    wait(setting)
    return figures


gpt2 = functools.partial(one_device, name="gpt2")
bert = functools.partial(one_device, name="bert")
resnet = functools.partial(one_device, name="resnet")
