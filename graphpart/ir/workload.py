"""What one step consists of: its tasks, and what waits for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from graphpart.ir.gc_pause import no_collection
from graphpart.ir.program import Backward, Program, Segment, SegmentBackward, Wire
from graphpart.ir.schedule import Task, place_of_update, update_of
from graphpart.ir.task_index import TaskIndex


@dataclass(frozen=True)
class Workload:
    """The tasks of one step; schedules order them, the simulator and the workers run them.

    Attributes:
        program: the lowered program.
        backward: the backward pass for one set of live wires, or None for forward only.
        split: whether gradients of weights are tasks of their own (``W``), after those of inputs (``B``).
        updates: whether each device updates its parameters at the step's end (``U``).
        update_every: of how many microbatches' gradients a device takes before it updates its :meth:`local_weights`
            within the step (asynchronous); None updates at the end alone.
        stash_weights: whether, with such updates, a microbatch's backward sees the weights of its forward.
    """

    program: Program
    backward: Backward | None = None
    split: bool = False
    updates: bool = False
    update_every: int | None = None
    stash_weights: bool = True

    @cached_property
    def waits_for(self) -> Mapping[Task, tuple[Task, ...]]:
        """Per task, the tasks that must have ended before it may start."""
        tasks = self.index.tasks
        return {
            task: tuple([tasks[number] for number in before])
            for task, before in zip(tasks, self.index.before, strict=True)
        }

    @cached_property
    @no_collection()
    def index(self) -> TaskIndex:
        """The tasks by number, and what each waits for.

        This is the one readiness rule: ordering, the dry run, the simulator and both executors rest on it.
        """
        program, forward, makers = self.program, self._forward, self._gradient_makers
        value_maker = {wire.name: forward[wire.segment] if wire.segment else None for wire in program.wires}
        segments = list(program.segments)
        tasks = [Task("F", segment.name) for segment in segments]
        before: list[tuple[int, ...]] = []
        for segment in program.segments:
            made_by = dict.fromkeys([value_maker[name] for name in segment.inputs])
            before.append(tuple([number for number in made_by if number is not None]))
        for name, (whole, apart) in self._backward.items():
            own = forward[name]
            tasks.append(Task("B", name))
            segments.append(segments[own])
            users = [user for wire in self._works[name].outputs for user in makers.get(wire, ())]
            before.append((own, *dict.fromkeys(users)))
            if apart != whole:
                tasks.append(Task("W", name))
                segments.append(segments[own])
                before.append((whole,))
        for device in sorted(self.trained) if self.updates else ():
            early = self._early_updates(device, segments, len(tasks))
            before += early.values()
            before.append((*self._before_update(device), *range(len(tasks), len(tasks) + len(early))))
            tasks += [*early, update_of(device)]
        return TaskIndex(tuple(tasks), tuple(before), tuple(segments), value_maker, makers)

    @property
    def _works(self) -> Mapping[str, SegmentBackward]:
        return {} if self.backward is None else self.backward.segments

    @cached_property
    def _forward(self) -> Mapping[str, int]:
        """Per segment, the number of its forward task."""
        return {segment.name: number for number, segment in enumerate(self.program.segments)}

    @cached_property
    def _backward(self) -> Mapping[str, tuple[int, int]]:
        """Per segment, the numbers of what makes its gradients and of what makes those of its weights; often one."""
        found, number = {}, len(self.program.segments)
        for name, work in self._works.items():
            last = number + bool(self.split and work.weights)
            found[name] = (number, last)
            number = last + 1
        return found

    @cached_property
    def _gradient_makers(self) -> Mapping[str, tuple[int, ...]]:
        """Per wire, the numbers of :meth:`makers`."""
        works, numbers = self._works, self._backward
        return {
            wire: tuple([numbers[name][wire in works[name].weights] for name in names])
            for wire, names in (self.backward.contributors.items() if self.backward is not None else ())
        }

    @cached_property
    def trained(self) -> Mapping[int, tuple[Wire, ...]]:
        """Per device, the wires of parameters at home there that get a gradient; only devices that have some."""
        found: dict[int, list[Wire]] = {}
        for name in self.backward.sources if self.backward is not None else ():
            wire = self.program.wire[name]
            if wire.origin == "parameter":
                found.setdefault(wire.device, []).append(wire)
        return {device: tuple(wires) for device, wires in found.items()}

    def local_weights(self, device: int) -> tuple[str, ...]:
        """Wires of the parameters that a device can update within the step.

        They are at home there whole, read nowhere else, and get their gradient microbatch by microbatch: what is
        computed of weights alone (a slice of a table of positions) runs once a step, and has its gradient at the end.
        """
        contributors = {} if self.backward is None else self.backward.contributors
        segment = self.program.segment
        return tuple(
            wire.name
            for wire in self.trained.get(device, ())
            if wire.name == wire.value
            and all(segment[name].device == device for name in self.program.readers[wire.name])
            and all(segment[name].microbatch is not None for name in contributors[wire.name])
        )

    def _early_updates(self, device: int, segments: Sequence[Segment], first: int) -> dict[Task, tuple[int, ...]]:
        """Updates within the step, each behind the gradients of its microbatches; the last ones' come at the end.

        Args:
            device: whose.
            segments: per number of a task, its segment.
            first: the number of the first of these updates.
        """
        found: dict[Task, tuple[int, ...]] = {}
        if self.update_every is None or not (weights := self.local_weights(device)):
            return found
        makers = dict.fromkeys(number for wire in weights for number in self._gradient_makers.get(wire, ()))
        every = self.update_every
        for last in range(every - 1, self.program.num_microbatches - 1, every):
            group = range(last - every + 1, last + 1)
            if own := [number for number in makers if segments[number].microbatch in group]:
                found[update_of(device, last)] = (*own, *([first + len(found) - 1] if found else []))
        return found

    def makers(self, wire: str) -> tuple[Task, ...]:
        """The tasks that make a part of a wire's gradient, in the order in which the parts are added."""
        return tuple([self.index.tasks[number] for number in self._gradient_makers.get(wire, ())])

    def _before_update(self, device: int) -> tuple[int, ...]:
        """What reads a trained parameter that is at home on a device, forward and backward."""
        found: dict[int, None] = {}
        for wire in self.trained[device]:
            for name in self.program.readers[wire.name]:
                found[self._forward[name]] = None
                if name in self._backward:
                    found[self._backward[name][0]] = None
            found.update(dict.fromkeys(self._gradient_makers.get(wire.name, ())))
        return tuple(found)

    @cached_property
    def device_of(self) -> Mapping[Task, int]:
        """Per task, the index of its device."""
        return dict(zip(self.index.tasks, self.index.device.tolist(), strict=True))

    def microbatch_of(self, task: Task) -> int | None:
        """Which microbatch a task belongs to; None if the step runs it once."""
        return None if task.kind == "U" else self._segment(task).microbatch

    def _segment(self, task: Task) -> Segment:
        return self.program.segment[task.segment]

    @cached_property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Stages as (level, device), in order; a stage is what one device does at one level, for every microbatch."""
        return tuple(sorted({(segment.level, segment.device) for segment in self.program.segments}))

    @cached_property
    def texts(self) -> Mapping[Task, str]:
        """Per task, its text: stage, kind, microbatch (``2F0``, ``2W0``); an update has its device (``2U``)."""
        number = {stage: i for i, stage in enumerate(self.stages)}
        found = {}
        for task in self.waits_for:
            if task.kind == "U":
                place, microbatch = place_of_update(task)
            else:
                segment = self._segment(task)
                place, microbatch = number[segment.level, segment.device], segment.microbatch
            found[task] = f"{place}{task.kind}{'' if microbatch is None else microbatch}"
        return found
