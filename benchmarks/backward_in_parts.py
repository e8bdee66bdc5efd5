"""The whole backward against the backward in two parts: the price of gradients of weights as tasks of their own.

Ratio = (gradients of inputs, then of weights) / (all at once), each pair run one after the other on the same values.
Schedules that fill bubbles with gradients of weights gain only if this is near 1. Beside it, what the usual way costs:
autograd asked twice for the same graph, for inputs and then for weights.

    python benchmarks/backward_in_parts.py [--model linear gpt2 resnet] [--pairs 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, ResNetConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.resnet.modeling_resnet import ResNetStage

import graphpart as gp
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of
from graphpart.order import gpipe
from graphpart.runtime.device.device_code import BackwardCode
from graphpart.runtime.executors.threads import LocalExecutor


class First(nn.Module):
    """A block that returns a tensor alone, whatever it returns."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """What comes first."""
        found = self.block(x)
        return found if isinstance(found, Tensor) else found[0]


def linear() -> tuple[nn.Module, Tensor]:
    """Eight linear layers of 1,024 features with GELU between, 512 rows."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.GELU())]
    return nn.Sequential(*layers), torch.randn(512, 1024)


def gpt2() -> tuple[nn.Module, Tensor]:
    """A block of GPT-2 small, 4 samples of 128 tokens."""
    config = GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0)
    return First(GPT2Block(config, layer_idx=0)), torch.randn(4, 128, 768)


def resnet() -> tuple[nn.Module, Tensor]:
    """The third stage of ResNet-50, 4 images of 28 x 28 positions."""
    return First(ResNetStage(ResNetConfig(), 512, 1024, stride=2, depth=6)), torch.randn(4, 512, 28, 28)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"linear": linear, "gpt2": gpt2, "resnet": resnet}


class Dropped:
    """Takes gradients of parameters and forgets them."""

    def keep(self, *_: object) -> None:
        """Forget a gradient."""


def backwards(model: nn.Module, x: Tensor) -> Callable[[bool], tuple[float, float]]:
    """Takes whether to split; gives the seconds of the gradients of inputs (or of all), and of those of weights."""
    parted = gp.partition(model.train(), ["cpu:0"], strategy="single")
    call, _ = parted._traces.find((x,), {})
    program, executor = call.launch.program, LocalExecutor(call.launch.devices)
    (output,) = (name for name in program.outputs if name)
    backward = backward_of(program, [output])
    code = BackwardCode.build(program, backward, 0)
    leaves, at_hand = [x], {}

    def run(split: bool) -> tuple[float, float]:
        step = executor.start(
            call.launch,
            lambda i, name: call._read(program.wire[name], call.launch.devices[i], leaves, at_hand),
            grad=True,
            seed=0,
        )
        step.runs[0].split = split
        schedule = gpipe(Workload(program, backward, split))
        out = executor.forward(step)[output]
        step.runs[0].begin_backward(code, {output: torch.ones_like(out)}, Dropped())
        times = []
        for kind in "BW":
            start = time.perf_counter()
            step.runs[0].run(schedule.of_kinds(kind)[0])
            times.append(time.perf_counter() - start)
        step.runs[0].collect()
        return times[0], times[1]

    return run


def twice(model: nn.Module, x: Tensor) -> float:
    """Seconds that autograd takes for inputs and then for weights, over those for all at once."""

    def run(parts: list[list[Tensor]]) -> float:
        out = model(x)
        start = time.perf_counter()
        for i, part in enumerate(parts):
            torch.autograd.grad(out, part, torch.ones_like(out), retain_graph=i + 1 < len(parts))
        return time.perf_counter() - start

    parameters = list(model.parameters())
    return run([[x], parameters]) / run([[x, *parameters]])


def main() -> None:
    """Run the pairs and print a line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    for name in options.model:
        torch.manual_seed(0)
        model, x = MODELS[name]()
        x.requires_grad_()
        twice(model, x)
        asked_twice = statistics.median(twice(model, x) for _ in range(5))
        run = backwards(model, x)
        for split in (False, True, False, True):
            run(split)
        pairs = [(run(True), run(False)) if i % 2 else (run(False), run(True))[::-1] for i in range(options.pairs)]
        ratios = sorted(sum(parts) / sum(whole) for parts, whole in pairs)
        whole, inputs, weights = (
            1e3 * statistics.median(found)
            for found in zip(*((sum(whole), *parts) for parts, whole in pairs), strict=True)
        )
        print(
            f"{name:7} whole {whole:6.1f} ms  inputs {inputs:6.1f} ms + weights {weights:6.1f} ms  ratio median "
            f"{statistics.median(ratios):.3f} (min {ratios[0]:.3f}, max {ratios[-1]:.3f}, {len(pairs)} pairs); "
            f"asked twice {asked_twice:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
