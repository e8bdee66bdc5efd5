"""From a torch model and example arguments to a :class:`~graphpart.ir.graph.Graph`."""

from graphpart.trace.convert import trace
from graphpart.trace.loss import NO_TARGET, Loss
from graphpart.trace.traced import Traced

__all__ = ["NO_TARGET", "Loss", "Traced", "trace"]
