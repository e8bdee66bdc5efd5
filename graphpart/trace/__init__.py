"""From a torch model and example arguments to a :class:`~graphpart.ir.graph.Graph`."""

from graphpart.trace.convert import Traced, trace

__all__ = ["Traced", "trace"]
