"""The parts of ``sweep.py``: architectures by library, what is done with one, and the table of what came of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from sweep_parts.harness import Architecture

LIBRARIES = {
    "transformers": "hub",
    "timm": "images",
    "torchvision": "images",
    "diffusers": "diffusion",
    "torch_geometric": "graphs",
}
"""Per library, the module here that knows its architectures."""


def architectures(library: str) -> Mapping[str, Architecture]:
    """The architectures of a library by name, built when asked.

    Raises:
        ImportError: if the library is missing.
    """
    importlib.import_module("sweep_parts.libraries").prepare(library)
    module = importlib.import_module(f"sweep_parts.{LIBRARIES[library]}")
    found: Mapping[str, Architecture] = module.architectures(library)
    return found
