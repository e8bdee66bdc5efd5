"""What a trace gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphpart.ir.graph import Graph
from graphpart.trace.hooks import Onlooker
from graphpart.trace.randomness import Noise
from graphpart.trace.rewrites import Layout
from graphpart.trace.views import View


@dataclass(frozen=True)
class Traced:
    """A traced model with what only torch can hold.

    Attributes:
        graph: the dataflow graph.
        out_spec: tree of the result, and of what the onlookers are given.
        input_index: per input of the graph, its position among the flattened arguments.
        constants: tensors made while tracing, or read from around the model, by value name.
        strides: per output of the graph, by value name, those that a copy of it has on one device.
        results: flattened result and what the onlookers are given; where the graph has an output, anything.
        onlookers: forward hooks to call after every run.
        layouts: per input of the graph that is addressed by strides, how it has to lie in memory.
        views: per flattened result that is a view, of what.
        noise: per value that each call draws anew, how, in the model's order; the graph has it as a constant.
    """

    graph: Graph
    out_spec: pytree.TreeSpec
    input_index: Mapping[str, int]
    constants: Mapping[str, torch.Tensor]
    strides: Mapping[str, tuple[int, ...]]
    results: tuple[Any, ...]
    onlookers: tuple[Onlooker, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    views: Mapping[int, View] = field(default_factory=dict)
    noise: Mapping[str, Noise] = field(default_factory=dict)
