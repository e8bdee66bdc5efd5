"""Errors from workers, with the operator, the device and the user's line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from graphpart.errors import ExecutionError, GraphpartError
from graphpart.ir.program import Segment
from graphpart.runtime.mailbox import Aborted

if TYPE_CHECKING:
    from graphpart.runtime.worker import DeviceCode


@contextlib.contextmanager
def located(segment: Segment, code: DeviceCode, direction: str) -> Iterator[None]:
    """Turn any error inside into one that says where it happened.

    Raises:
        ExecutionError: naming operator, device and source line; the original is its cause.
    """
    try:
        yield
    except (GraphpartError, Aborted):
        raise
    except Exception as reason:
        step = code.executables[segment.name].step_at(reason.__traceback__)
        operator = code.operator(step.operator) if step else None
        what = f"operator {operator}" if operator else f"the {direction} of segment {segment.name}"
        if operator is None and direction == "backward":
            names = list(dict.fromkeys(s.operator for s in segment.steps))
            what += f" ({names[0]} … {names[-1]})"
        part = "" if segment.microbatch is None else f", microbatch {segment.microbatch}"
        raise ExecutionError(
            f"{what} failed on device {code.device_index} ({code.device}{part}): {type(reason).__name__}: {reason}"
        ) from reason
