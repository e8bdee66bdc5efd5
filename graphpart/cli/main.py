"""The commands. ``explain``, ``draw`` and ``simulate`` load no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graphpart.cli.arguments import build_parser, choices_of
from graphpart.cli.progress import Progress
from graphpart.draw.words.text import plain_lines
from graphpart.errors import GraphpartError
from graphpart.planning.choices import Choices
from graphpart.planning.forecast import simulate
from graphpart.planning.make import make_plan
from graphpart.planning.plan import Plan

if TYPE_CHECKING:
    from graphpart.cli.models import Example
    from graphpart.cli.steps import TrainingRun
    from graphpart.module.partitioned import PartitionedModule

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; the process's own by default.

    Returns:
        The exit code: 0 done, 1 an error of ours, 2 wrong usage (raised by argparse).
    """
    parser = build_parser({"plan": _plan, "explain": _explain, "draw": _draw, "simulate": _simulate, "run": _run})
    options = parser.parse_args(arguments)
    if options.command is _run and options.devices is None and options.plan is None:
        parser.error("run needs --devices, for instance --devices 2, or --plan")
    try:
        code = int(options.command(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("graphpart: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (GraphpartError, OSError) as error:
        if options.debug:
            raise
        print(f"graphpart: {plain_lines(str(error))}", file=sys.stderr)
        return 1


def _plan(options: argparse.Namespace) -> int:
    progress = Progress(options.progress)
    with progress.stage("loading torch"):
        from graphpart.api import check_offload, find_cluster
        from graphpart.module.losses import default_loss
        from graphpart.trace import trace
        from graphpart.trace.loss import Loss
    choices = Choices(**choices_of(options))
    cluster = find_cluster(_devices(options.devices))
    check_offload(choices.offload, cluster)
    example = _example(options, progress, device="meta")
    name = type(example.model).__name__
    with progress.stage(f"tracing {name}"):
        loss = None if choices.schedule is None else Loss(default_loss)
        graph = trace(example.model, example.args, example.kwargs, sample_dims=choices.sample_dims, loss=loss).graph
    with progress.stage(f"planning {name} for {len(cluster)} devices"):
        plan = make_plan(graph, cluster, choices)
    # Files before the table: whoever reads the table may stop reading.
    if options.out:
        print(f"graphpart: the plan is in {plan.save(options.out)}", file=sys.stderr)
    if options.draw:
        with progress.stage("drawing"):
            picture = plan.draw(options.draw)
        print(f"graphpart: the picture is in {picture}", file=sys.stderr)
    _show(plan, progress)
    return 0


def _explain(options: argparse.Namespace) -> int:
    _show(Plan.load(options.plan), Progress(options.progress))
    return 0


def _draw(options: argparse.Namespace) -> int:
    with Progress(options.progress).stage("drawing"):
        plan = Plan.load(options.plan)
        picture = plan.draw(options.picture, max_boxes=options.max_boxes, bridges=options.bridges)
    print(f"graphpart: the picture is in {picture}", file=sys.stderr)
    return 0


def _simulate(options: argparse.Namespace) -> int:
    plan = Plan.load(options.plan)
    with Progress(options.progress).stage("simulating"):
        timeline = simulate(plan)
    print(timeline)
    if options.draw:
        title = f"{plan.graph.name} · {plan.strategy} · forecast"
        print(f"graphpart: the picture is in {timeline.draw(options.draw, title=title)}", file=sys.stderr)
    if options.trace:
        print(f"graphpart: the trace is in {timeline.save_trace(options.trace)}", file=sys.stderr)
    return 0


def _run(options: argparse.Namespace) -> int:
    progress = Progress(options.progress)
    example = _example(options, progress, device="cpu")
    given = None if options.plan is None else Plan.load(options.plan)
    parted = _partitioned(options, example, given)
    from graphpart.cli.steps import prepare

    fused = (options if given is None else given).schedule is not None
    with progress.stage(f"tracing and planning {type(example.model).__name__}"):
        plan = prepare(parted, example, fused)
    _show(plan, progress)
    if options.verify:
        with progress.stage("comparing with the plain model"):
            report = parted.verify(*example.args, **example.kwargs)
        print(f"\nverified: {report}")
    _report(plan, _trained(options, parted, example, fused, progress))
    if options.timeline:
        _compare(options, parted, plan, example, progress)
    return 0


def _partitioned(options: argparse.Namespace, example: Example, plan: Plan | None) -> PartitionedModule:
    from graphpart.api import partition
    from graphpart.cli.steps import share_cores

    devices = None if options.devices is None else _devices(options.devices)
    parted = partition(example.model, devices, plan=plan, **choices_of(options))
    share_cores(len(parted.cluster))
    return parted


def _trained(
    options: argparse.Namespace, parted: PartitionedModule, example: Example, fused: bool, progress: Progress
) -> TrainingRun:
    from tqdm import tqdm

    from graphpart.cli.steps import train

    steps = tqdm(range(options.steps), "training", unit="step", disable=not progress.shown, file=progress.stream)
    return train(parted, example, fused, steps, options.optimizer, options.lr)


def _report(plan: Plan, run: TrainingRun) -> None:
    from graphpart.ir.quantities import format_time

    first, last = run.losses[0], run.losses[-1]
    forecast_s, measured_s = plan.timeline.makespan_s, run.step_s
    print(f"\nloss {first:.4f} → {last:.4f} in {len(run.losses)} steps on one generated batch")
    parts = "forward and backward" if plan.schedule is None else "forward, backward and update"
    print(
        f"a step ({parts}) takes {format_time(measured_s)}, the median; "
        f"forecast {format_time(forecast_s)} ({100 * (forecast_s / measured_s - 1):+.0f} %)"
    )


def _compare(
    options: argparse.Namespace, parted: PartitionedModule, plan: Plan, example: Example, progress: Progress
) -> None:
    from graphpart.cli.steps import record
    from graphpart.draw.timeline.gantt import draw_timelines

    with progress.stage("recording a step"):
        predicted = simulate(plan)
        measured = record(parted, example, plan.schedule is not None, options.optimizer)
    print(f"\n{predicted.compare(measured)}")
    name = f"{plan.graph.name} · {plan.strategy}"
    picture = draw_timelines({f"{name} · forecast": predicted, f"{name} · measured": measured}, options.timeline)
    print(f"graphpart: the picture is in {picture}", file=sys.stderr)


def _example(options: argparse.Namespace, progress: Progress, device: str) -> Example:
    with progress.stage(f"building {options.model}"):
        from graphpart.cli.models import load_example

        return load_example(
            options.model,
            batch=options.batch,
            inputs=options.input,
            dtype=options.dtype,
            config=options.config,
            device=device,
            seed=getattr(options, "seed", 0),
        )


def _show(plan: Plan, progress: Progress) -> None:
    """Print a plan in words."""
    with progress.stage("forecasting"):
        text = plan.explain()
    print(text)


def _devices(text: str) -> int | str | list[str]:
    """Devices as the Python interface takes them."""
    if text.isdigit():
        return int(text)
    return text.split(",") if "," in text else text
