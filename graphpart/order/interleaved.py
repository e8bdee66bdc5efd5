"""Interleaved 1F1B: each device has several stages, so that a microbatch comes by sooner and the bubble is smaller.

Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", SC 2021, section 2.2.2. With K
devices of v stages each and M microbatches, M a multiple of K, the bubble is (K - 1) / (v M + K - 1).
"""

from __future__ import annotations

from typing import Any

from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order.engine import Durations, Policy, list_tasks


def interleaved(workload: Workload, durations: Durations | None = None) -> Schedule:
    """Order microbatches in groups of as many as there are devices, each group stage by stage.

    A device's stages are its levels in which it runs microbatches, and its rank is where its first stage comes.
    Of stages and microbatches together it begins ``2 (K - rank - 1) + (v - 1) K + 1`` before the first backward.

    Args:
        workload: the tasks of the step. The split has to give each device several stages, or this is 1F1B with more
            microbatches in flight.
        durations: seconds of each task; one unit each if None.
    """
    program = workload.program
    levels: dict[int, list[int]] = {}  # of each device that runs microbatches, by rank
    for segment in sorted(program.segments, key=lambda s: (s.level, s.device)):
        if segment.microbatch is not None and segment.level not in levels.setdefault(segment.device, []):
            levels[segment.device].append(segment.level)
    chunk = {(device, level): i for device, mine in levels.items() for i, level in enumerate(mine)}
    num_devices = max(len(levels), 1)

    def key(task: Task) -> tuple[Any, ...]:
        segment = program.segment[task.segment]
        if segment.microbatch is None:
            return ("WFB".index(task.kind),)
        stage = chunk[segment.device, segment.level]
        group, place = divmod(segment.microbatch, num_devices)
        return "WFB".index(task.kind), group, stage if task.kind == "F" else -stage, place

    def unit(task: Task) -> tuple[int, int] | None:
        segment = program.segment[task.segment]
        return None if segment.microbatch is None else (segment.level, segment.microbatch)

    most = [0] * program.num_devices
    for rank, (device, mine) in enumerate(levels.items()):
        most[device] = 2 * (num_devices - rank - 1) + (len(mine) - 1) * num_devices + 1
    return list_tasks("interleaved", workload, Policy(key, unit, {"BW": most}), durations)
