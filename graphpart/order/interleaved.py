"""Interleaved 1F1B: each device has several stages, so that a microbatch comes by sooner and the bubble is smaller.

Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", SC 2021, section 2.2.2. With K
devices of v stages each and M microbatches, M a multiple of K, the bubble is (K - 1) / (v M + K - 1).
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from graphpart.ir.schedule import Schedule
from graphpart.ir.workload import Workload
from graphpart.order.list_scheduler import Durations, Policy, list_tasks
from graphpart.order.preferences import by_kind
from graphpart.order.units import units


def interleaved(workload: Workload, durations: Durations | None = None) -> Schedule:
    """Order microbatches in groups of as many as there are devices, each group stage by stage.

    A device's stages are told apart by how often a microbatch has changed units (devices, or groups that split
    operators among them) to get there, and its rank is where its first stage comes. Before the first backward it begins
    as many pairs of stage and microbatch as :func:`most_begun` says.

    Args:
        workload: the tasks of the step. The split has to give each device several stages, or this is 1F1B with more
            microbatches in flight.
        durations: seconds of each task; one unit each if None.
    """
    stages, index = _stages(workload), workload.index
    # Replicas, and devices of a unit, come at the same place.
    rank = {first: i for i, first in enumerate(sorted({min(mine) for mine in stages.values()}))}
    num_ranks = max(len(rank), 1)
    stage_of = {
        name: i for mine in stages.values() for i, (_, names) in enumerate(sorted(mine.items())) for name in names
    }
    stage = np.zeros(len(index), np.int64)
    stage[: len(index.segments)] = [stage_of.get(segment.name, 0) for segment in index.segments]
    group, place = np.divmod(np.maximum(index.microbatch, 0), num_ranks)
    keys = by_kind(workload, "WFB"), group, np.where(index.kind == "F", stage, -stage), place
    unit = np.where(index.microbatch >= 0, stage * workload.program.num_microbatches + index.microbatch, -1)
    most = [1] * workload.program.num_devices
    for device, mine in stages.items():
        most[device] = most_begun(rank[min(mine)], num_ranks, len(mine))
    return list_tasks("interleaved", workload, Policy(keys, unit, {"BW": most}), durations)


def most_begun(rank: int, num_devices: int, num_stages: int) -> int:
    """Pairs of stage and microbatch that a device begins before its first backward.

    Args:
        rank: of the device on the way of a microbatch.
        num_devices: devices on that way.
        num_stages: stages of the device.
    """
    return 2 * (num_devices - rank - 1) + (num_stages - 1) * num_devices + 1


def _stages(workload: Workload) -> dict[int, dict[int, list[str]]]:
    """Per device, its stages by how often a microbatch has changed units to get there: the names of their segments.

    Only what has a backward counts; masks and counts of labels are at hand anywhere.
    """
    program, kept = workload.program, workload.backward.segments if workload.backward is not None else {}
    changes: dict[str, int] = {}  # of unit, on the longest way to a segment
    unit = units(program)
    stages: defaultdict[int, defaultdict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for segment in program.segments:
        if segment.name in kept:
            before = (program.segment[s] for s in (program.wire[name].segment for name in segment.inputs) if s in kept)
            here = unit[segment.device]
            changes[segment.name] = max((changes[s.name] + (unit[s.device] != here) for s in before), default=0)
            if segment.microbatch is not None:
                stages[segment.device][changes[segment.name]].append(segment.name)
    return {device: dict(mine) for device, mine in stages.items()}
