"""Feature and batch splits over one-thread workers, against DTensor, DDP and what so many cores can do at all.

All rivals train the same model in the same run, in turn: one eager process; the ceiling (as many independent eager
processes at once as there are workers, their combined throughput over one's); graphpart's ``feature`` and ``batch``
strategies (on threads); tensor parallelism by DTensor and data parallelism by DDP (on processes, Gloo). Medians are
printed.

    python benchmarks/strategies.py [--model mlp|blocks] [--rounds 7] [--workers 2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import graphpart as gp

RIVALS = ("ceiling", "dtensor", "ddp")
Step = Callable[[], float]


class Pair(nn.Module):
    """Linear, GELU, linear, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[..., width]`` to the same."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))


class Attention(nn.Module):
    """Causal self-attention with separate projections, so that DTensor's plans apply."""

    def __init__(self, width: int, head_width: int = 64) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[batch, seq, width]`` to the same."""
        batch, seq, _ = x.shape
        y = self.norm(x)
        q, k, v = (
            layer(y).view(batch, seq, -1, self.head_width).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(batch, seq, -1))


class Stack(nn.Module):
    """Blocks, and a squared error against the input, so that every rival returns one number."""

    def __init__(self, kind: str, layers: int, width: int) -> None:
        super().__init__()
        blocks = [[Pair(width)] if kind == "mlp" else [Attention(width), Pair(width)] for _ in range(layers)]
        self.blocks = nn.ModuleList(part for block in blocks for part in block)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Loss of ``[batch, ..., width]`` against a target of that shape."""
        for block in self.blocks:
            x = block(x)
        return nn.functional.mse_loss(x, target)


def build(options: argparse.Namespace) -> Stack:
    torch.manual_seed(0)
    return Stack(options.model, options.layers, options.width).train()


def batch_of(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.width) if options.model == "mlp" else (options.batch, 128, options.width)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def stepper(model: nn.Module, x: Tensor, target: Tensor) -> Step:
    """One training step (forward, backward, SGD), timed in seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(x, target).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def tensor_parallel(model: Stack, workers: int) -> nn.Module:
    """Megatron's plan by DTensor: column, then row, in every block."""
    mesh = init_device_mesh("cpu", (workers,))
    for block in model.blocks:
        columns = ("query", "key", "value") if isinstance(block, Attention) else ("up",)
        row = "out" if isinstance(block, Attention) else "down"
        plan = {name: ColwiseParallel() for name in columns} | {row: RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    return model


def _process(rank: int, folder: str, barrier: Any, results: Any, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    workers = options.workers
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=workers)
    x, target = batch_of(options)
    own = slice(rank * options.batch // workers, (rank + 1) * options.batch // workers)
    steps = {
        "ceiling": stepper(build(options), x, target),
        "dtensor": stepper(tensor_parallel(build(options), workers), x, target),
        "ddp": stepper(DistributedDataParallel(build(options)), x[own], target[own]),
    }
    for step in steps.values():
        step()
    for _ in range(options.rounds):
        for name in RIVALS:
            barrier.wait()
            results.put(steps[name]())
            barrier.wait()
    dist.destroy_process_group()


def main() -> None:
    """Measure in rounds and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mlp", "blocks"), default="mlp")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=0, help="samples; 1024 for mlp, 8 for blocks")
    options = parser.parse_args()
    options.batch = options.batch or (1024 if options.model == "mlp" else 8)
    report(measure(options), options.workers)


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of every round, by contender; ours are verified first."""
    context = mp.get_context("spawn")
    barrier, results = context.Barrier(options.workers + 1, timeout=120), context.Queue()
    folder = tempfile.TemporaryDirectory()
    others = [
        context.Process(target=_process, args=(r, folder.name, barrier, results, options), daemon=True)
        for r in range(options.workers)
    ]
    for process in others:
        process.start()
    x, target = batch_of(options)
    torch.set_num_threads(options.workers)  # one for each worker
    parted = {name: gp.partition(build(options), options.workers, strategy=name) for name in ("feature", "batch")}
    for model in parted.values():
        print(model.verify(x, target))
    torch.set_num_threads(1)
    ours = {name: stepper(model, x, target) for name, model in parted.items()}
    eager = stepper(build(options), x, target)
    eager()
    times: dict[str, list[float]] = {name: [] for name in ("eager", *ours, *RIVALS)}
    for _ in range(options.rounds):
        times["eager"].append(eager())
        for name, step in ours.items():
            times[name].append(step())
        for name in RIVALS:
            barrier.wait()
            barrier.wait()
            times[name].append(max(results.get() for _ in others))
    for process in others:
        process.join()
    folder.cleanup()
    return times


def report(times: dict[str, list[float]], workers: int) -> None:
    """Medians, and the ratios asked for."""
    median = {name: statistics.median(found) for name, found in times.items()}
    for name, found in times.items():
        print(f"{name:8s} {median[name] * 1e3:8.1f} ms  ({min(found) * 1e3:.1f} to {max(found) * 1e3:.1f})")
    ceiling = workers * median["eager"] / median["ceiling"]
    print(f"ceiling of {workers} workers: {ceiling:.2f}x one eager process")
    for name, rival in (("feature", "dtensor"), ("batch", "ddp")):
        gain = median["eager"] / median[name]
        against = median[rival] / median[name]
        print(f"{name}: {gain:.2f}x eager = {gain / ceiling:.1%} of the ceiling; {against:.2f}x as fast as {rival}")


if __name__ == "__main__":
    main()
