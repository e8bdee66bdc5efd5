"""From a graph and a placement to a program: tiles, bridges, segments. Rewrites; never decides."""

from graphpart.lower.backward import backward_of, live_outputs, parts_of, terms_of, trained_outputs
from graphpart.lower.lower import lower

__all__ = ["backward_of", "live_outputs", "lower", "parts_of", "terms_of", "trained_outputs"]
