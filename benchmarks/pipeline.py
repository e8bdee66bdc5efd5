"""Two workers and eight microbatches against what two cores can do at all.

The ceiling is measured in the same run: two independent one-thread processes that both train the model, their combined
throughput over one's. GPipe with K = 2 stages and M = 8 microbatches can reach ceiling * M / (M + K - 1) of one device
(Huang et al., 2019). The figure to report is the share of that which is reached.

    python benchmarks/pipeline.py [--rounds 5] [--microbatches 8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

import graphpart as gp

SEQUENCE, VOCABULARY = 128, 512


def build(layers: int, width: int) -> torch.nn.Module:
    """A GPT-2 whose vocabulary is small, so that two equal halves exist; dropout off."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=width // 64,
        vocab_size=VOCABULARY,
        n_positions=SEQUENCE,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).train()


def stepper(model: Any, batch: int) -> Callable[[], float]:
    """One training step (forward, backward, SGD), timed in seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    ids = torch.randint(0, VOCABULARY, (batch, SEQUENCE), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def _independent(barrier: Any, results: Any, options: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    step = stepper(build(options.layers, options.width), options.batch)
    step()
    for _ in range(options.rounds):
        barrier.wait()
        results.put(step())
        barrier.wait()


def main() -> None:
    """Measure in rounds: one eager process, two eager processes at once, the pipeline; print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    context = mp.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    pair = [context.Process(target=_independent, args=(barrier, results, options)) for _ in range(2)]
    for process in pair:
        process.start()
    torch.set_num_threads(1)
    eager = stepper(build(options.layers, options.width), options.batch)
    torch.set_num_threads(2)  # one for each worker
    parted = gp.partition(
        build(options.layers, options.width), 2, strategy="layer", num_microbatches=options.microbatches
    )
    pipeline = stepper(parted, options.batch)
    pipeline()
    eager()
    ones, twos, pipes = [], [], []
    for _ in range(options.rounds):
        torch.set_num_threads(1)
        ones.append(eager())
        barrier.wait()
        barrier.wait()
        twos.append(max(results.get(), results.get()))
        torch.set_num_threads(2)
        pipes.append(pipeline())
    for process in pair:
        process.join()
    one, two, pipe = map(statistics.median, (ones, twos, pipes))
    ceiling = 2 * one / two
    ideal = ceiling * options.microbatches / (options.microbatches + 1)
    print(parted.plan.explain())
    print(
        f"one eager process {one:.3f} s; two at once {two:.3f} s (ceiling {ceiling:.2f}x); pipeline {pipe:.3f} s = "
        f"{one / pipe:.2f}x; possible {ideal:.2f}x; reached {one / pipe / ideal:.1%}"
    )


if __name__ == "__main__":
    main()
