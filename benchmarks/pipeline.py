"""``train_step`` against ``torch.distributed.pipelining``, and against what so many cores can do at all.

Every contender trains the same GPT-2 on two workers (or more) with one thread each; they alternate in rounds, and
medians are compared. The ceiling is measured in the same rounds: as many independent one-thread processes that all
train the model, their combined throughput over one's. K stages and M microbatches without bubble reach it; GPipe and
1F1B can reach ``M / (M + K - 1)`` of it (Huang et al., 2019). First, loss and gradients of each are compared with one
device's.

    python benchmarks/pipeline.py [--rounds 7] [--microbatches 8] [--layers 8] [--width 256] [--batch 16]
        [--vocabulary 512] [--workers 2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from contenders import CHUNKS, RIVALS, VOCABULARY, Contender, difference, eager, graphpart, rival

TOLERANCE = 1e-5
Make = Callable[[argparse.Namespace], Contender]
Times = Mapping[str, list[float]]
"""Seconds of each round, by contender."""

CHUNKS_OF = {name: CHUNKS if name == "interleaved" else 1 for name in RIVALS}

ON_THREADS: Mapping[str, Make] = {
    **{f"threads {name}": partial(graphpart, schedule=name, chunks=n) for name, n in CHUNKS_OF.items()},
    "threads auto order": partial(graphpart, schedule="auto"),
    "threads auto order, interleaved cut": partial(graphpart, schedule="auto", chunks=CHUNKS),
    "threads auto cut and order": partial(graphpart, schedule="auto", strategy="layer"),
    "threads auto": partial(graphpart, schedule="auto", strategy="auto"),
}
RIVALS_ON_PROCESSES: Mapping[str, Make] = {
    **{f"torch {name}": partial(rival, schedule=name, chunks=n) for name, n in CHUNKS_OF.items()},
    "all alone": eager,
    "one alone": eager,
}
ON_PROCESSES: Mapping[str, Make] = {
    **{f"processes {name}": partial(graphpart, schedule=name, chunks=n) for name, n in CHUNKS_OF.items()},
    "processes auto order": partial(graphpart, schedule="auto"),
}


def timed(contender: Contender) -> tuple[float, float]:
    """Seconds of one step: by the clock, and of all cores in this process, which other programs touch less."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    contender.step(False)
    return time.perf_counter() - start_s, time.process_time() - start_cpu_s


def worker(
    rank: int, folder: str, orders: Any, answers: Any, makers: Mapping[str, Make], options: argparse.Namespace
) -> None:
    """One of the processes: answers each order ``(what, contender)`` until there are none left."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=options.workers)
    built: dict[str, Contender] = {}
    while (order := orders.get()) is not None:
        what, name = order
        try:
            if what == "check":
                built[name] = makers[name](options)
                answers.put((difference(built[name], eager(options)), built[name].note()))
            else:
                dist.barrier()
                rests = name == "one alone" and rank > 0
                answers.put((0.0, 0.0) if rests else timed(built[name]))
        except Exception:
            answers.put(traceback.format_exc())
    dist.destroy_process_group()


class Processes:
    """One process a worker, as the main one sees them.

    Rivals have some of their own: graphpart tells malloc to keep freed memory, which would help them too.
    """

    def __init__(self, makers: Mapping[str, Make], options: argparse.Namespace) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.answers = context.Queue()
        self.orders = [context.Queue() for _ in range(options.workers)]
        self.processes = [
            context.Process(
                target=worker, args=(i, self.folder.name, orders, self.answers, makers, options), daemon=True
            )
            for i, orders in enumerate(self.orders)
        ]
        for process in self.processes:
            process.start()

    def check(self, name: str) -> tuple[float, str]:
        """Build a contender; how far it is from one device, and its note."""
        return max(self._ask("check", name))

    def time(self, name: str) -> list[tuple[float, float]]:
        """Seconds of a step on each process: by the clock, and of its cores."""
        return self._ask("time", name)

    def _ask(self, what: str, name: str) -> list[Any]:
        """Give all an order; their answers."""
        for orders in self.orders:
            orders.put((what, name))
        found = [self.answers.get(timeout=300) for _ in self.orders]
        for answer in found:
            if isinstance(answer, str):
                raise SystemExit(f"{name}: {answer}")
        return found

    def stop(self) -> None:
        """Let them end."""
        for orders in self.orders:
            orders.put(None)
        for process in self.processes:
            process.join()
        self.folder.cleanup()


class Threads:
    """This process, whose contenders work on threads."""

    def __init__(self, makers: Mapping[str, Make], options: argparse.Namespace) -> None:
        self.makers, self.options = makers, options
        self.built: dict[str, Contender] = {}

    def check(self, name: str) -> tuple[float, str]:
        """Build a contender; how far it is from one device, and its note."""
        torch.set_num_threads(self.options.workers)  # one for each worker thread, which starts in the first step
        contender = self.built[name] = self.makers[name](self.options)
        found = difference(contender, eager(self.options)), contender.note()
        torch.set_num_threads(1)
        return found

    def time(self, name: str) -> list[tuple[float, float]]:
        """Seconds of a step: by the clock, and of all cores."""
        return [timed(self.built[name])]

    def stop(self) -> None:
        """Nothing to end."""


def measure(options: argparse.Namespace) -> tuple[Times, Times]:
    """Seconds a step of every round, by the clock and of all cores; each contender's numbers are checked first."""
    places: list[tuple[Mapping[str, Make], Processes | Threads]] = [
        (RIVALS_ON_PROCESSES, Processes(RIVALS_ON_PROCESSES, options)),
        (ON_PROCESSES, Processes(ON_PROCESSES, options)),
        (ON_THREADS, Threads(ON_THREADS, options)),
    ]
    place_of = {
        name: place
        for makers, place in places
        for name in makers
        if "alone" in name or any(only in name for only in options.only)
    }
    for name, place in place_of.items():
        found, note = place.check(name)
        print(f"{name:38} differs by {found:.1e} from one device{f'; {note}' if note else ''}", flush=True)
        if found > TOLERANCE:
            raise SystemExit(f"{name} gives other numbers than one device")
    times: dict[str, list[float]] = {name: [] for name in place_of}
    cpu_times: dict[str, list[float]] = {name: [] for name in place_of}
    for round_index in range(options.rounds + 1):
        for name in place_of if round_index % 2 else reversed(place_of):
            seconds = place_of[name].time(name)
            if round_index:  # the first warms up
                times[name].append(max(time_s for time_s, _ in seconds))
                cpu_times[name].append(sum(cpu_s for _, cpu_s in seconds))
    for _, place in places:
        place.stop()
    return times, cpu_times


def report(times: Times, cpu_times: Times, options: argparse.Namespace) -> None:
    """Medians by the clock and of all cores' work; ratios are medians of the rounds' own, above 1 is faster."""
    ceiling = options.workers * ratio(times, "one alone", "all alone")
    bubble = options.microbatches / (options.microbatches + options.workers - 1)
    print(f"ceiling {ceiling:.2f}x of one process; with the bubble of GPipe and 1F1B {ceiling * bubble:.2f}x")
    rivals = {name: f"torch {name}" for name in RIVALS if f"torch {name}" in times}
    best = min(rivals.values(), key=lambda name: statistics.median(times[name]), default=None)
    columns = ["step", "all cores", "of ceiling", "x same order", "x best torch", "x torch gpipe"]
    print(" " * 38, *(f"{column:>13}" for column in columns))
    for name, own in times.items():
        seconds = [f"{statistics.median(of):.3f} s" for of in (own, cpu_times[name])]
        share = "" if "alone" in name else f"{ratio(times, 'one alone', name) / ceiling:.1%}"
        others = [rivals.get(name.split(" ", 1)[1]), best, rivals.get("gpipe")]
        against = [f"{ratio(times, other, name):.3f}" if other else "" for other in others]
        print(f"{name:38}", *(f"{cell:>13}" for cell in (*seconds, share, *against)))


def ratio(times: Times, slow: str, fast: str) -> float:
    """Median over rounds of one's time over the other's; above 1 the second is faster."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def main() -> None:
    """Check, measure in rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="a large one makes the last stage heavy")
    parser.add_argument("--only", nargs="*", default=[""], help="contenders whose names contain one of these")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    report(*measure(options), options)


if __name__ == "__main__":
    main()
