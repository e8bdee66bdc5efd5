"""Libraries that may be missing, or be there without what they have compiled."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

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
            for compiled in sorted(Path(spec.origin).parent.glob("_C*.so")):
                torch.ops.load_library(str(compiled))
            torch.ops.torchvision.nms  # noqa: B018  (raises if it is not there)
        except (OSError, AttributeError):
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(library)
