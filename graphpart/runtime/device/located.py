"""Errors from workers, with the operator, the device and the user's line."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from graphpart.errors import DeviceOutOfMemoryError, ExecutionError, GraphpartError
from graphpart.ir.program import Segment
from graphpart.ir.quantities import format_bytes
from graphpart.runtime.device.mailbox import Aborted

if TYPE_CHECKING:
    from graphpart.runtime.device.codegen import Executable
    from graphpart.runtime.device.device_code import DeviceCode


def _is_out_of_memory(reason: Exception) -> bool:
    return isinstance(reason, torch.OutOfMemoryError) or "can't allocate memory" in str(reason)


def _memory(code: DeviceCode) -> str:
    """What was forecast for a device, what it took, and the reserve that would have told the planner."""
    device = code.cluster_device
    on_gpu = code.device.type == "cuda"
    measured = float(torch.cuda.max_memory_allocated(code.device) if on_gpu else device.memory_bytes)
    excess = max(measured - code.forecast_bytes, 0.0) / device.memory_bytes
    reserve = min(math.ceil((excess + 0.05) * 20) / 20, 0.95)
    forecast, peak, limit = map(format_bytes, (code.forecast_bytes, measured, device.memory_bytes))
    return (
        f"device {code.device_index} ({device.name}): forecast {forecast}, "
        f"{'measured peak' if on_gpu else 'the worker has'} {peak}, of {limit}; plan with "
        f"memory_reserve={reserve:.2f}, more microbatches or a smaller batch"
    )


@contextlib.contextmanager
def located(segment: Segment, executable: Executable, code: DeviceCode, direction: str) -> Iterator[None]:
    """Turn any error inside into one that says where it happened.

    Raises:
        ExecutionError: naming operator, device and source line; the original is its cause.
    """
    try:
        yield
    except (GraphpartError, Aborted):
        raise
    except Exception as reason:
        step = executable.step_at(reason.__traceback__)
        operator = code.operator(step.operator) if step else None
        what = f"operator {operator}" if operator else f"the {direction} of segment {segment.name}"
        if operator is None and direction == "backward":
            names = list(dict.fromkeys(s.operator for s in segment.steps))
            what += f" ({names[0]} … {names[-1]})"
        if _is_out_of_memory(reason):
            raise DeviceOutOfMemoryError(f"{what} ran out of memory on {_memory(code)}: {reason}") from reason
        part = "" if segment.microbatch is None else f", microbatch {segment.microbatch}"
        raise ExecutionError(
            f"{what} failed on device {code.device_index} ({code.device}{part}): {type(reason).__name__}: {reason}"
        ) from reason
