"""What a call costs beside its operators: the first one, which traces and plans, and those after it.

A repeated call is of so small a model that the host's own work is nearly all of it, as one graph and in pieces; beside
it is the plain model's. Times are of the processor. To compare two versions, run it in the checkout of each in turn.

    python benchmarks/calls.py [--first gpt2 bert resnet] [--calls 300] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import graphpart as gp
from benchmarks.overhead import MODELS


class Small(nn.Module):
    """Four layers of 8 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's result; shape (samples, 8)."""
        for layer in self.layers:
            x = layer(x).relu()
        return x


class Between(Small):
    """The same in two graphs, with Python between them."""

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's result; shape (samples, 8)."""
        x = self.layers[0](x).relu()
        torch._dynamo.graph_break()
        for layer in self.layers[1:]:
            x = layer(x).relu()
        return x


def first_call_s(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Processor seconds until the first call has its result."""
    parted = gp.partition(model, 2, strategy="layer")
    since = time.process_time()
    parted(**batch)
    return time.process_time() - since


def call_us(call: Callable[[Tensor], Tensor], num_calls: int) -> float:
    """Processor microseconds of a repeated call, the median of ten rounds."""
    x = torch.randn(4, 8)
    rounds = []
    with torch.no_grad():
        call(x)
        call(x)
        for _ in range(10):
            since = time.process_time()
            for _ in range(num_calls // 10):
                call(x)
            rounds.append((time.process_time() - since) / (num_calls // 10))
    return statistics.median(rounds) * 1e6


def main() -> None:
    """Print a line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", nargs="*", choices=MODELS, default=list(MODELS), help="models called once")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s)")
    for model in (Small(), Between()):
        ours, plain = call_us(gp.partition(model, 1), options.calls), call_us(model, options.calls)
        print(f"{type(model).__name__:8} repeated {ours:6.0f} us, plain {plain:6.0f} us")
    first_call_s(Small(), {"x": torch.randn(4, 8)})  # what torch makes once
    for name in options.first:
        print(f"{name:8} first call {first_call_s(*MODELS[name](2)):6.2f} s")


if __name__ == "__main__":
    main()
