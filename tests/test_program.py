"""A program that breaks what runtime and simulator rest on cannot be made."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from graphpart.errors import ProgramError
from graphpart.ir.program import Program
from tests.helpers.pipelines import pipeline, random_workload

Breakage = Callable[[Program], Program]


def first_segment(program: Program, **changes: object) -> Program:
    segments = (replace(program.segments[-1], **changes), *program.segments[:-1])  # type: ignore[arg-type]
    return replace(program, segments=segments)


def first_bridge(program: Program, **changes: object) -> Program:
    return replace(program, bridges=(replace(program.bridges[0], **changes), *program.bridges[1:]))  # type: ignore[arg-type]


BROKEN: dict[str, Breakage] = {
    "wire 'a0.m0' is there twice": lambda p: replace(p, wires=(*p.wires, p.wire["a0.m0"])),
    "segment 's0.m0' is there twice": lambda p: replace(p, segments=(*p.segments, p.segments[0])),
    "tag 1 is there twice": lambda p: first_bridge(p, tag=1),
    r"message \('a0.m0', 1\) is there twice": lambda p: replace(p, bridges=(*p.bridges, replace(p.bridges[0], tag=99))),
    "wire 'a0.m0' is not on the device of a segment 's0.m0'": lambda p: replace(
        p, wires=tuple(replace(w, device=1) if w.name == "a0.m0" else w for w in p.wires)
    ),
    "gives 'nothing', which is no wire": lambda p: replace(p, outputs=("nothing",)),
    "carries no wire that is there, or not all of it": lambda p: first_bridge(p, size_bytes=1),
    "goes nowhere": lambda p: first_bridge(p, destination=0),
    "reads 'nothing', which is no wire": lambda p: first_segment(p, inputs=("nothing",)),
    "of level 0 reads 'a0.m1', which is made at level 0 by 's0.m1'": lambda p: first_segment(p, level=0),
    "reads 'a0.m0', which no message brings there": lambda p: replace(p, bridges=p.bridges[1:]),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_program_is_refused(message: str) -> None:
    program = pipeline(2, 2).program
    with pytest.raises(ProgramError, match=message):
        BROKEN[message](program)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_lowered_is_sound(seed: int) -> None:
    program = random_workload(random.Random(seed))[0].program
    assert replace(program) == program
