"""The arguments that the commands take."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, cast

from graphpart.errors import ArgumentError
from graphpart.ir.degrees import Degrees
from graphpart.lower.wire_dtype import WIRE_DTYPES
from graphpart.planning.choices import DEFAULT_CHOICES, ChoiceKeywords, Choices

Command = Callable[[argparse.Namespace], int]

OPTIMIZER_BYTES = {"adamw": 8.0, "momentum": 4.0, "sgd": 0.0}
"""Bytes of optimizer state per parameter element."""

_MODEL = """\
a preset (gpt2, bert-base, llama-70b, resnet-50, vit-base, …), hf:CLASS for a class of transformers (see --config), or
file.py:factory, a function that gives a model, (model, args) or (model, args, kwargs). Weights are random; nothing is
downloaded"""

_DEVICES = "a number, names (cuda:0,cuda:1), a preset (8xH100, 4xA100+4xV100, 2xCPU), or a TOML file of a cluster"

_EPILOG = """\
examples:
  graphpart plan llama-70b --devices 64xH100 --batch 8x2048 --dtype bfloat16 --microbatches 8 --out plan.json
  graphpart explain plan.json
  graphpart draw plan.json plan.svg
  graphpart simulate plan.json --draw step.svg --trace step.json
  graphpart run gpt2-tiny --devices 2 --microbatches 4 --steps 20 --verify
  graphpart run gpt2-tiny --devices 2 --microbatches 8 --schedule 1f1b --timeline step.svg
  graphpart run model.py:factory --devices cuda:0,cuda:1

exit codes: 0 done; 1 an error of graphpart's, told in a line on standard error; 2 wrong usage."""


def build_parser(commands: dict[str, Command]) -> argparse.ArgumentParser:
    """The parser; ``options.command`` is the function to call.

    Args:
        commands: by name: ``plan``, ``explain``, ``draw``, ``simulate`` and ``run``.
    """
    parser = argparse.ArgumentParser(
        prog="graphpart",
        description="Split a PyTorch model over devices: plan it without them, look at the plan, run it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.import_module("graphpart").__version__
    parser.add_argument("--version", action="version", version=f"graphpart {version}")
    names = parser.add_subparsers(metavar="COMMAND", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show what is being done; by default on a terminal",
    )

    plan = names.add_parser("plan", parents=[shared], help="plan a model for devices that need not be here")
    _add_model(plan)
    _add_choices(plan)
    plan.add_argument("--devices", required=True, metavar="DEVICES", help=_DEVICES)
    plan.add_argument("--out", metavar="PLAN.json", help="save the plan")
    plan.add_argument("--draw", metavar="PICTURE", help="draw the plan to .svg, .png, .pdf or .dot")

    explain = names.add_parser("explain", parents=[shared], help="a saved plan in words")
    explain.add_argument("plan", metavar="PLAN.json")

    draw = names.add_parser("draw", parents=[shared], help="a picture of a saved plan")
    draw.add_argument("plan", metavar="PLAN.json")
    draw.add_argument("picture", metavar="PICTURE", help="file to write: .svg, .png, .pdf or .dot")
    draw.add_argument("--max-boxes", type=_positive, default=60, metavar="N", help="most boxes (60)")
    draw.add_argument(
        "--bridges",
        action=argparse.BooleanOptionalAction,
        help="a frame a device, with every send, receive, slice, concat and sum (where that is small: on)",
    )

    simulate = names.add_parser("simulate", parents=[shared], help="a training step of a saved plan, device by device")
    simulate.add_argument("plan", metavar="PLAN.json")
    simulate.add_argument("--draw", metavar="STEP.svg", help="draw it: a row a device")
    simulate.add_argument("--trace", metavar="STEP.json", help="write a trace for ui.perfetto.dev, memory included")

    run = names.add_parser("run", parents=[shared], help="train a model for some steps on generated data")
    _add_model(run)
    _add_choices(run)
    run.add_argument("--devices", metavar="DEVICES", help=f"{_DEVICES}; by default those of --plan")
    run.add_argument("--plan", metavar="PLAN.json", help="use a saved plan of the same model")
    run.add_argument("--steps", type=_positive, default=10, metavar="N", help="training steps (10)")
    run.add_argument("--lr", type=float, default=1e-3, metavar="RATE", help="learning rate (0.001)")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, data and dropout (0)")
    run.add_argument("--verify", action="store_true", help="first compare loss and gradients with the plain model")
    run.add_argument(
        "--timeline", metavar="STEP.svg", help="compare a step, device by device, with its forecast; draw both"
    )
    parsers = {"plan": plan, "explain": explain, "draw": draw, "simulate": simulate, "run": run}
    for name, command in parsers.items():
        command.set_defaults(command=commands[name])
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--config", metavar="FILE.json", help="configuration of a hf: model; its defaults otherwise")
    parser.add_argument("--batch", default="", metavar="SIZE", help="samples and tokens (8x2048), or samples (8)")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="shape of a positional argument, such as 8x3x224x224 or 8x128:int64; once for each",
    )
    parser.add_argument("--dtype", default="float32", metavar="DTYPE", help="of parameters (float32)")


def _add_choices(parser: argparse.ArgumentParser) -> None:
    for name, (flag, settings) in CHOICE_OPTIONS.items():
        default = getattr(DEFAULT_CHOICES, name)
        # The optimizer's state follows from --optimizer unless it is given.
        default = None if name == "optimizer_bytes_per_element" else default
        group = parser.add_mutually_exclusive_group() if name == "strategy" else parser
        group.add_argument(flag, dest=name, default=default, **settings)
        if name == "strategy":
            settings = {"default": argparse.SUPPRESS, "type": _degrees, "metavar": "DEGREES", "help": _DEGREES}
            group.add_argument("--degrees", dest=name, **settings)
    parser.add_argument(
        "--optimizer", choices=tuple(OPTIMIZER_BYTES), default="adamw", help="whose state to count memory for (adamw)"
    )


def choices_of(options: argparse.Namespace) -> ChoiceKeywords:
    """What was chosen, as keywords of ``partition()`` and ``plan()``: what is not as it is by default.

    Args:
        options: the parsed command line.
    """
    given = {field.name: getattr(options, field.name) for field in fields(Choices)}
    for name in ("strategy_options", "sample_dims"):
        given[name] = None if given[name] is None else dict(given[name])
    if given["optimizer_bytes_per_element"] is None and getattr(options, "plan", None) is None:
        given["optimizer_bytes_per_element"] = OPTIMIZER_BYTES[options.optimizer]
    default = {field.name: getattr(DEFAULT_CHOICES, field.name) for field in fields(Choices)}
    return cast(ChoiceKeywords, {n: v for n, v in given.items() if v is not None and v != default[n]})


def _strategy(text: str) -> str | dict[str, Any]:
    """A name, or a placement by hand, as the Python interface takes them."""
    return dict(map(_named_value, text.split(","))) if "=" in text else text


def _degrees(text: str) -> str:
    """Degrees, in their own spelling."""
    try:
        return str(Degrees.read(text))
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


_DEGREES = "into how many parts: replicas (dp), parts of features (tp), stages (pp), such as 'dp2 tp4 pp2'"


def _named_value(text: str) -> tuple[str, Any]:
    """``name=value``: a number, ``true``, ``false``, ``none`` or text."""
    name, equals, value = text.rpartition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a name and a value, as in chunks=2")
    words = {"true": True, "false": False, "none": None}
    value = value.strip()
    return name.strip(), int(value) if value.isdigit() else words.get(value.lower(), value)


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return number


def _recompute(text: str) -> str | list[str]:
    """``auto``, ``none``, or patterns, as the Python interface takes them."""
    patterns = [pattern.strip() for pattern in text.split(",")]
    if not all(patterns):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto, none nor patterns such as transformer.h.*")
    return patterns[0] if patterns in (["auto"], ["none"]) else patterns


def _part(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in [0, 1)")
    return number


CHOICE_OPTIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "strategy": (
        "--strategy",
        {
            "type": _strategy,
            "metavar": "NAME",
            "help": "auto (default), layer, batch, feature, spatial, hybrid, free or single; degrees ('dp2 tp4'); or "
            "by hand, patterns over module paths with their devices (encoder.*=0,*=1)",
        },
    ),
    "strategy_options": (
        "--strategy-option",
        {
            "type": _named_value,
            "action": "append",
            "metavar": "NAME=VALUE",
            "help": "an option of the strategy (chunks=2, shard_parameters=true); once for each",
        },
    ),
    "num_microbatches": (
        "--microbatches",
        {"type": _positive, "metavar": "N", "help": "parts of the batch, in time (1)"},
    ),
    "schedule": (
        "--schedule",
        {
            "metavar": "NAME",
            "help": "order of a training step: gpipe, 1f1b, interleaved, zero-bubble, list, async, or auto, which "
            "compares; without it, plain calls and loss.backward()",
        },
    ),
    "sample_dims": (
        "--sample-dims",
        {
            "type": _named_value,
            "action": "append",
            "metavar": "INPUT=DIM",
            "help": "the dimension of an input that runs over samples, or none (args[0]=1, mask=none); once for each",
        },
    ),
    "wire_dtype": (
        "--wire-dtype",
        {
            "choices": WIRE_DTYPES,
            "help": "what float32 activations are cast to between devices; by default they are sent as they are",
        },
    ),
    "recompute": (
        "--recompute",
        {
            "type": _recompute,
            "metavar": "WHAT",
            "help": "what runs again for its backward instead of keeping activations: auto (default: the model's "
            "checkpoints, and what memory needs), none, or modules by pattern (transformer.h.*,lm_head)",
        },
    ),
    "offload": (
        "--offload",
        {"action": "store_true", "help": "on GPUs, let what running again needs wait in the host's memory"},
    ),
    "batch_norm": (
        "--batch-norm",
        {"choices": ("barrier", "microbatch"), "help": "how BatchNorm sees microbatches"},
    ),
    "optimizer_bytes_per_element": (
        "--optimizer-bytes",
        {
            "type": float,
            "metavar": "BYTES",
            "help": "of optimizer state per parameter element; by default what --optimizer has: 8, 4 or 0",
        },
    ),
    "memory_reserve": (
        "--memory-reserve",
        {"type": _part, "metavar": "PART", "help": "part of each memory to leave free (0)"},
    ),
    "deadline_s": (
        "--deadline",
        {"type": float, "metavar": "SECONDS", "help": "how long a device waits for one message (600)"},
    ),
}
"""By field of :class:`graphpart.Choices`, its option of the command line."""
