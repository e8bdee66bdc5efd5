"""Architectures of timm and torchvision: models of images with two classes."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from sweep_parts.harness import Architecture, NotRunnable, Sample

BATCH, SIZE = 4, 64
MOST_PARAMETERS = 8_000_000

TIMM = (
    "resnet10t", "test_vit", "test_vit2", "test_resnet", "test_efficientnet", "test_convnext", "test_byobnet",
    "test_mambaout", "test_nfnet", "regnetx_002", "regnety_002", "mobilenetv3_small_050", "efficientnet_lite0",
    "mixer_s32_224", "convnext_atto", "convnextv2_atto", "ghostnet_050", "tinynet_e", "lcnet_035", "fbnetc_100",
    "mobilevit_xxs", "edgenext_xx_small", "poolformerv2_s12", "repvgg_a0", "vit_tiny_patch16_224",
    "deit_tiny_patch16_224", "xcit_nano_12_p16_224", "levit_128s", "cait_xxs24_224", "pit_ti_224",
    "crossvit_tiny_240", "visformer_tiny", "swinv2_cr_tiny_224", "hardcorenas_a", "semnasnet_075",
    "mnasnet_small", "dla46_c", "efficientvit_m0", "fastvit_t8", "repghostnet_050",
)  # fmt: skip
SIZED = ("vit", "deit", "mixer", "xcit", "levit", "cait", "pit", "swinv2")
"""Families whose positions are as many as the image has patches."""

TORCHVISION = (
    "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
    "efficientnet_b0", "regnet_y_400mf", "regnet_x_400mf", "densenet121", "googlenet", "resnet18", "vit",
    "swin", "lraspp_mobilenet_v3_large",
)  # fmt: skip


def architectures(library: str) -> Mapping[str, Architecture]:
    """The families listed here."""
    build, names = (_timm, TIMM) if library == "timm" else (_torchvision, TORCHVISION)
    return {name: functools.partial(build, name) for name in names}


def _timm(name: str) -> Sample:
    import timm

    sized = {"img_size": SIZE} if any(family in name for family in SIZED) and "efficientvit" not in name else {}
    return _sample(timm.create_model(name, num_classes=2, **sized), SIZE)


def _torchvision(name: str) -> Sample:
    import torchvision
    from torchvision.models.swin_transformer import SwinTransformer
    from torchvision.models.vision_transformer import VisionTransformer

    if name == "vit":
        return _sample(VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=2), 32)
    if name == "swin":
        return _sample(SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=2), 32)
    more = {"weights_backbone": None} if name.startswith("lraspp") else {}
    more |= {"init_weights": False} if name == "googlenet" else {}
    return _sample(torchvision.models.get_model(name, weights=None, num_classes=2, **more), SIZE)


def _sample(model: torch.nn.Module, size: int) -> Sample:
    count = sum(p.numel() for p in model.parameters())
    if count > 2 * MOST_PARAMETERS:
        raise NotRunnable(f"too large: {count} parameters")
    images = [torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    name = "pixels"
    return Sample(_Named(model), ({name: images[0]}, {name: images[1]}))


class _Named(torch.nn.Module):
    """A model of an image by keyword: libraries call it ``x``, ``input`` and more."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> object:
        return self.model(pixels)
