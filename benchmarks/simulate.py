"""How long the simulator takes for a training step of a long pipeline: by default 1,024 devices, 512 microbatches.

The program is a chain: one stage a device, one message from each stage to the next and one gradient back, a microbatch.
That is a million tasks and a million messages. One core; the step is simulated once.

    python benchmarks/simulate.py [--devices 1024] [--microbatches 512] [--schedule 1f1b]
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

from graphpart.cost.time.task_times import task_times
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.graph import Graph, Operator, Ref, Source, Value
from graphpart.ir.program import Backward, Bridge, Program, Segment, SegmentBackward, Step, Wire
from graphpart.ir.region import Region
from graphpart.ir.workload import Workload
from graphpart.order import SCHEDULES, dry_run, make_schedule
from graphpart.simulator import simulate_workload

DEVICE = Device("", "toy", {"float32": 1.0}, 10**9, 1e30, efficiency=1.0, overhead_s=0.0)


def chain(num_devices: int, num_microbatches: int) -> tuple[Workload, Cluster]:
    """A chain of equal stages: 1 s forward, 2 s backward, messages that take no time to speak of."""
    part, size = Region.full((1,)), 4
    operators, wires, segments, bridges, gradients = [], [], [], [], []
    backward: dict[str, SegmentBackward] = {}
    contributors: dict[str, tuple[str, ...]] = {}
    flops = float(num_microbatches)
    for d in range(num_devices):
        reads = f"v{d - 1}" if d else "x"
        value = Value(f"v{d}", (num_microbatches,), "float32", True)
        operators.append(
            Operator(f"v{d}", "aten.toy.default", (Ref(reads),), results=(value,), flops_forward=flops,
                     flops_backward=2 * flops)
        )  # fmt: skip
    for m in range(num_microbatches):
        wires.append(Wire(f"x.{m}", "x", part, (1,), "float32", size, "input", 0, m))
        for d in range(num_devices):
            name, made = f"S{d}.{m}", f"v{d}.{m}"
            reads = f"v{d - 1}.{m}" if d else f"x.{m}"
            step = Step(f"v{d}", "aten.toy.default", (Ref(reads),), {}, (made,), share=1 / num_microbatches)
            wires.append(Wire(made, f"v{d}", part, (1,), "float32", size, "segment", d, m, name, True))
            segments.append(Segment(name, d, m, d, (step,), (reads,), (made,), fraction=1 / num_microbatches))
            backward[name] = SegmentBackward((made,), (reads,) if d else ())
            if d:
                contributors[reads] = (name,)
                bridges.append(Bridge(reads, d - 1, d, size, len(bridges)))
                gradients.append(Bridge(reads, d, d - 1, size, len(gradients)))
    graph = Graph(
        "Chain", (Source(Value("x", (num_microbatches,), "float32"), "input", ("args[0]",)),), tuple(operators),
        (Ref(operators[-1].name),), sample_dims={"x": 0},
    )  # fmt: skip
    last = tuple(f"v{num_devices - 1}.{m}" for m in range(num_microbatches))
    program = Program(graph, num_devices, num_microbatches, (1,) * num_microbatches, tuple(wires), tuple(segments),
                      tuple(bridges), last[:1], ())  # fmt: skip
    gradient_devices = {bridge.wire: (bridge.source,) for bridge in gradients}
    pass_back = Backward(last, backward, contributors, gradient_devices, tuple(gradients), ())
    names = (f"toy:{d}" for d in range(num_devices))
    devices = tuple(Device(n, "toy", DEVICE.flops_per_s, 10**9, 1e30, 1.0, 0.0) for n in names)
    return Workload(program, pass_back), Cluster(devices, Link(1e-9, 1e30))


def main() -> None:
    """Build, price, order, check and simulate; print the CPU time of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1024)
    parser.add_argument("--microbatches", type=int, default=512)
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), default="1f1b")
    options = parser.parse_args()
    laps = [time.process_time()]
    workload, cluster = chain(options.devices, options.microbatches)
    laps.append(time.process_time())
    times = task_times(workload, cluster)
    laps.append(time.process_time())
    schedule = make_schedule(options.schedule, workload, times)
    laps.append(time.process_time())
    dry_run(workload, schedule)
    laps.append(time.process_time())
    timeline = simulate_workload(workload, schedule, cluster, times=times)
    laps.append(time.process_time())
    num_tasks = len(workload.index)
    print(f"{options.devices} devices, {options.microbatches} microbatches, {options.schedule}: {num_tasks:,} tasks, "
          f"{timeline.num_messages:,} messages; seconds of CPU:")  # fmt: skip
    phases = ("build the program", "task_times", "make_schedule", "dry_run", "simulate")
    for phase, (start_s, end_s) in zip(phases, pairwise(laps), strict=True):
        print(f"  {phase:<18} {end_s - start_s:6.2f}")
    bubble = (options.devices - 1) / (options.microbatches + options.devices - 1)
    print(f"bubble {timeline.bubble:.4f}, by the formula (K-1)/(M+K-1) {bubble:.4f}")


if __name__ == "__main__":
    main()
