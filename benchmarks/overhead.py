"""A training step on one device, partitioned against eager: the price of going through the graph.

Ratio = partitioned / eager, each pair run one after the other; below 1 is faster than eager. Eager is PyTorch's own
module call, ``loss.backward()`` and AdamW step, on the same model and batch.

    python benchmarks/overhead.py [--model gpt2 bert resnet] [--pairs 8] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import graphpart as gp

Batch = dict[str, torch.Tensor]


def gpt2(batch: int) -> tuple[torch.nn.Module, Batch]:
    """GPT-2 small, 124 M parameters, 128 tokens a sample."""
    model = GPT2LMHeadModel(GPT2Config(use_cache=False))
    ids = torch.randint(0, 50257, (batch, 128))
    return model, {"input_ids": ids, "labels": ids.clone()}


def bert(batch: int) -> tuple[torch.nn.Module, Batch]:
    """BERT base, 110 M parameters, 128 tokens a sample."""
    model = BertForSequenceClassification(BertConfig())
    ids = torch.randint(0, 30522, (batch, 128))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 2, (batch,))}


def resnet(batch: int) -> tuple[torch.nn.Module, Batch]:
    """ResNet-50, 25.6 M parameters, 224 x 224 pixels."""
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    return model, {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.randint(0, 1000, (batch,))}


MODELS: dict[str, Callable[[int], tuple[torch.nn.Module, Batch]]] = {"gpt2": gpt2, "bert": bert, "resnet": resnet}


def stepper(model: Any, batch: Batch) -> Callable[[], float]:
    """One training step, timed in seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Run the pairs and print a line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    for name in options.model:
        torch.manual_seed(0)
        model, batch = MODELS[name](options.batch)
        eager = stepper(copy.deepcopy(model).train(), batch)
        parted = stepper(gp.partition(model.train(), ["cpu:0"]), batch)
        for step in (eager, parted, eager, parted):
            step()
        pairs = [(parted(), eager()) if i % 2 else (eager(), parted())[::-1] for i in range(options.pairs)]
        ratios = sorted(a / b for a, b in pairs)
        print(
            f"{name:8} eager {statistics.median(b for _, b in pairs):.3f} s  partitioned "
            f"{statistics.median(a for a, _ in pairs):.3f} s  ratio median {statistics.median(ratios):.3f} "
            f"(min {ratios[0]:.3f}, max {ratios[-1]:.3f}, {len(pairs)} pairs)",
            flush=True,
        )


if __name__ == "__main__":
    main()
