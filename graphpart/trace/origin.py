"""Where an operator comes from: its module and the user's source line."""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from graphpart.ir.graph import SourceLine

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), "<")
"""Starts of file names: torch's, graphpart's, and generated code such as ``<string>``."""
_FRAME = re.compile(r'File "(.+?)", line (\d+), in .*\n\s*(.*)')
_ORIGIN = ("nn_module_stack", "stack_trace", "custom")
_REGION_LINE = re.compile(r"^\s*(region\d+_\w+) = ", re.MULTILINE)


def module_path(node: torch.fx.Node) -> str:
    """The module that called the operator, such as ``transformer.h.0.attn``."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return str(path).split("@")[0]


def call_path(node: torch.fx.Node) -> str:
    """The same, each module that was called before with its call (``layer@2.attn@2``); empty if none was."""
    parts = module_path(node).split(".")
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        _, is_marked, number = str(key).rpartition("@")
        depth = len(str(path).split("@")[0].split("."))
        if is_marked and depth <= len(parts):
            parts[depth - 1] += f"@{number}"
    path = ".".join(parts)
    return path if "@" in path else ""


def source_line(node: torch.fx.Node) -> SourceLine | None:
    """The innermost frame of the user's own code, from the trace that export recorded."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_NOT_THE_USERS)]
    if not own:
        return None
    file, line, code = own[-1]
    return SourceLine(file, int(line), code.strip())


def user_line(where: TracebackType | None = None) -> SourceLine | None:
    """The innermost line that is neither torch's nor graphpart's, of a traceback or else of the stack."""
    return user_line_of(traceback.extract_stack() if where is None else traceback.extract_tb(where))


def user_line_of(frames: Sequence[traceback.FrameSummary]) -> SourceLine | None:
    """The innermost line that is neither torch's nor graphpart's, of some frames, the outermost first."""
    for frame in reversed(frames):
        if not frame.filename.startswith(_NOT_THE_USERS):
            return SourceLine(frame.filename, frame.lineno or 0, frame.line or "")
    return None


def warn_user(text: str) -> None:
    """Warn at the innermost line on the stack that is neither torch's nor graphpart's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def mark_regions(module: torch.fx.GraphModule) -> dict[str, dict[str, Any]]:
    """Give every operator inside a ``no_grad`` or autocast region a name of its own, and note where it comes from.

    Decomposition inlines regions and forgets modules and source lines, but keeps the line of generated code.
    """
    origin: dict[str, dict[str, Any]] = {}
    for i, inner in enumerate(module.modules()):
        if isinstance(inner, torch.fx.GraphModule) and inner is not module:
            for node in inner.graph.nodes:
                if node.op == "call_function":
                    node._rename(f"region{i}_{node.name}")
                    origin[node.name] = {k: v for k, v in node.meta.items() if k in _ORIGIN}
            inner.recompile()
    return origin


def restore_origin(graph: torch.fx.Graph, origin: Mapping[str, Mapping[str, Any]]) -> None:
    """Put back what :func:`mark_regions` noted."""
    for node in graph.nodes:
        names = _REGION_LINE.findall(node.meta.get("stack_trace") or "")
        if names and names[-1] in origin:
            node.meta.update(origin[names[-1]])
