"""What ``pipeline.py`` compares: one training step of the same GPT-2, each way to run it behind one face.

All have the same weights, batch, microbatches, loss function and optimizer, and one thread a worker. The weights of
embedding and head are apart, as ``torch.distributed.pipelining`` leaves tied weights of different stages to its user.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from transformers import GPT2Config, GPT2LMHeadModel

import graphpart as gp

CHUNKS = 2
"""Stages of each worker where they are interleaved."""

SEQUENCE, VOCABULARY = 128, 512

RIVALS = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
}
"""The schedules of torch by our names."""


@dataclass
class Contender:
    """One way to run a training step.

    Attributes:
        model: the whole model, or what a process has of it under the same names.
        step: runs a step and returns the loss, or None where another process has it. Gradients stay if asked.
        clear: frees gradients that stayed.
        note: what was decided, after the first step.
    """

    model: nn.Module
    step: Callable[[bool], Tensor | None]
    clear: Callable[[], None]
    note: Callable[[], str] = field(default=lambda: "")


def build(options: argparse.Namespace) -> GPT2LMHeadModel:
    """The model, always with the same weights; a small vocabulary lets equal stages exist; dropout off."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=options.layers,
        n_embd=options.width,
        n_head=max(1, options.width // 64),
        vocab_size=options.vocabulary,
        n_positions=SEQUENCE,
        use_cache=False,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).train()


def tokens(options: argparse.Namespace) -> Tensor:
    """The batch: tokens ``[batch, sequence]``."""
    return torch.randint(0, options.vocabulary, (options.batch, SEQUENCE), generator=torch.Generator().manual_seed(0))


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token; every microbatch has as many, so means of microbatches have one mean."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].reshape(-1))


def loss_of_output(output: Any, ids: Tensor) -> Tensor:
    """The same, of what the whole model returns."""
    return next_token_loss(output.logits, ids)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Plain SGD."""
    return torch.optim.SGD(model.parameters(), lr=1e-4)


def eager(options: argparse.Namespace) -> Contender:
    """One device, the batch in one piece."""
    model, ids = build(options), tokens(options)
    optimizer = optimizer_of(model)

    def step(keep: bool) -> Tensor:
        loss = loss_of_output(model(input_ids=ids), ids)
        loss.backward()
        optimizer.step()
        if not keep:
            optimizer.zero_grad()
        return loss.detach()

    return Contender(model, step, optimizer.zero_grad)


def graphpart(options: argparse.Namespace, schedule: str, *, chunks: int = 1, strategy: Any = None) -> Contender:
    """``train_step`` on worker threads, or on processes where ``torch.distributed`` runs.

    Args:
        options: sizes.
        schedule: by name.
        chunks: stages of each worker.
        strategy: how to split; None cuts where the rival is cut.
    """
    parted = gp.partition(
        build(options),
        options.workers,
        strategy=cut(options, chunks) if strategy is None else strategy,
        num_microbatches=options.microbatches,
        schedule=schedule,
        optimizer_bytes_per_element=0,
    )
    optimizer, ids = optimizer_of(parted), tokens(options)

    def step(keep: bool) -> Tensor:
        found = parted.train_step(
            input_ids=ids, target=ids, loss_fn=loss_of_output, optimizer=optimizer, keep_gradients=keep, record=False
        )
        return found.loss

    return Contender(
        parted, step, optimizer.zero_grad, lambda: f"{parted.plan.strategy}, {parted.plan.training.schedule.name}"
    )


def stages_of(options: argparse.Namespace, chunks: int) -> list[range]:
    """The blocks of each stage: as many in each, or one more in the first ones."""
    num_stages = options.workers * chunks
    ends = [options.layers * i // num_stages for i in range(num_stages + 1)]
    return [range(first, end) for first, end in itertools.pairwise(ends)]


def cut(options: argparse.Namespace, chunks: int) -> dict[str, int]:
    """The rival's cut as patterns; the stages go round the workers."""
    found = {"transformer.wte": 0, "transformer.wpe": 0}
    for stage, blocks in enumerate(stages_of(options, chunks)):
        found.update({f"transformer.h.{i}.*": stage % options.workers for i in blocks})
    return {**found, "transformer.ln_f": options.workers - 1, "lm_head": options.workers - 1}


class Stage(nn.Module):
    """Some blocks of the model, with the embedding before the first and the head after the last."""

    def __init__(self, model: GPT2LMHeadModel, blocks: range, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(model.transformer.h[i] for i in blocks)
        is_first, is_last = blocks.start == 0, blocks.stop == layers
        self.embedding = nn.ModuleList([model.transformer.wte, model.transformer.wpe]) if is_first else None
        self.head = nn.Sequential(model.transformer.ln_f, model.lm_head) if is_last else None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or hidden states ``[batch, sequence, ...]`` to hidden states or logits."""
        if self.embedding is not None:
            words, places = self.embedding
            x = words(x) + places(torch.arange(x.shape[1]).unsqueeze(0))
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(x)


def rival(options: argparse.Namespace, schedule: str, *, chunks: int = 1) -> Contender:
    """``torch.distributed.pipelining``, on processes."""
    model, ids, rank = build(options), tokens(options), dist.get_rank()
    divided = stages_of(options, chunks)
    own = range(rank, len(divided), options.workers)
    modules = [Stage(model, divided[i], options.layers) for i in own]
    stages = [
        pipelining.PipelineStage(module, i, len(divided), torch.device("cpu"))
        for i, module in zip(own, modules, strict=True)
    ]
    # Its loss is a mean, so gradients that add up over microbatches are divided by their number (scale_grads=True).
    kind: Any = RIVALS[schedule]
    runner = kind(stages if chunks > 1 else stages[0], options.microbatches, loss_fn=next_token_loss)
    optimizer = optimizer_of(nn.ModuleList(modules))
    is_last = rank == options.workers - 1

    def step(keep: bool) -> Tensor | None:
        losses: list[Tensor] = []
        inputs = (ids,) if rank == 0 else ()
        wanted = {"target": ids, "losses": losses} if is_last else {}
        runner.step(*inputs, return_outputs=False, **wanted)
        optimizer.step()
        if not keep:
            optimizer.zero_grad()
        return torch.stack(losses).mean().detach() if is_last else None

    return Contender(model, step, optimizer.zero_grad)


def difference(contender: Contender, reference: Contender) -> float:
    """Largest relative difference of loss and gradients after a first step each, which leaves the gradients."""
    loss, expected = contender.step(True), reference.step(True)
    assert expected is not None
    found = 0.0 if loss is None else abs(float(loss - expected) / float(expected))
    mine = contender.model.grad_dict() if isinstance(contender.model, gp.PartitionedModule) else None
    if mine is None:
        mine = {name: p.grad for name, p in contender.model.named_parameters()}
    for name, parameter in reference.model.named_parameters():
        gradient = mine[name]
        if gradient is not None:
            scale = float(parameter.grad.abs().max())
            found = max(found, float((gradient - parameter.grad).abs().max()) / scale)
    contender.clear()
    reference.clear()
    return found
