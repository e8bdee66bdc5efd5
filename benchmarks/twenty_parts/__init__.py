"""The parts of ``twenty_steps.py``: models by name, how they are trained, and the table of what came of them."""

from __future__ import annotations

from collections.abc import Mapping

from twenty_parts import detection, graphs, language, physics, pictures, sequences
from twenty_parts.training import Maker

MAKERS: Mapping[str, Maker] = {
    **language.MAKERS,
    **pictures.MAKERS,
    **detection.MAKERS,
    **sequences.MAKERS,
    **graphs.MAKERS,
    **physics.MAKERS,
}
"""Each makes its model and its batches when asked; ImportError where its library is missing."""
