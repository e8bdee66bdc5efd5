"""Libraries that may be missing, or be there without what they have compiled."""

from __future__ import annotations

import importlib
import importlib.util

import torch

_KEPT = []


def prepare(library: str) -> str:
    """Import a library; its version.

    Raises:
        ImportError: if it is missing.
    """
    if importlib.util.find_spec("torchvision") is not None:
        _without_operators()
    return str(importlib.import_module(library).__version__)


def _without_operators() -> None:
    """Torchvision of another build than torch (for CUDA, say) has no operators of its own, and fails when imported.

    Of these operators one is asked for at once. Declared, it lets the rest be used: models of classes and of pixels.
    """
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    if not _KEPT:
        try:
            torch.ops.load_library(spec.origin.replace("__init__.py", "_C.so"))
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(library)
