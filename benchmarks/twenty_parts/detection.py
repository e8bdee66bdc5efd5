"""Detectors: DETR, which matches boxes to objects in SciPy, and two that suppress boxes by ``nms``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from twenty_parts.training import Maker, Training, adamw, sgd

BATCH, SIZE, CLASSES = 4, 32, 3


def _objects(seed: int, most: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Per image, classes and boxes (centre and size, as shares of the image) of a number of objects that varies."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(BATCH):
        number = 1 + (i + seed) % most
        sizes = 0.2 + 0.3 * torch.rand(number, 2, generator=draw)
        centres = 0.3 + 0.4 * torch.rand(number, 2, generator=draw)
        found.append((torch.randint(CLASSES, (number,), generator=draw), torch.cat([centres, sizes], 1)))
    return found


def _images(seed: int) -> Tensor:
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def detr() -> Training:
    """DETR with a ResNet; its loss needs Pillow to be there."""
    import PIL  # noqa: F401
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = DetrConfig(
        backbone_config=backbone, num_queries=6, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0, num_labels=CLASSES,
        auxiliary_loss=True,
    )  # fmt: skip
    batches = []
    for i in range(4):
        mask = torch.ones(BATCH, SIZE, SIZE, dtype=torch.long)
        mask[0, :, SIZE // 2 :] = 0
        labels = [{"class_labels": kinds, "boxes": boxes} for kinds, boxes in _objects(i)]
        batches.append({"pixel_values": _images(i), "pixel_mask": mask, "labels": labels})
    return Training(DetrForObjectDetection(config), batches, None, adamw)


def suppressed(boxes: Tensor, scores: Tensor, most: float) -> Tensor:
    """Indices of boxes (corners) that no better one overlaps by more than a share, the best first: ``nms``."""
    order, kept = scores.argsort(descending=True), []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while len(order) > 0:
        best, rest = order[0], order[1:]
        kept.append(best)
        low, high = torch.maximum(boxes[best, :2], boxes[rest, :2]), torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        order = rest[shared / (areas[best] + areas[rest] - shared) <= most]
    return torch.stack(kept)


class Detector(nn.Module):
    """Two stages: proposals of a grid, of which ``nms`` leaves some, and a head that looks at those again."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
        )
        self.scores, self.boxes = nn.Conv2d(width, 1, 1), nn.Conv2d(width, 4, 1)
        self.head = nn.Sequential(nn.Linear(width + 4, 32), nn.ReLU(), nn.Linear(32, CLASSES + 4))

    def forward(self, images: Tensor, kinds: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Losses of both stages."""
        features = self.body(images)
        scores = self.scores(features).flatten(1)
        centres, sizes = self.boxes(features).flatten(2).transpose(1, 2).sigmoid().split(2, 2)
        corners = torch.cat([centres - sizes / 2, centres + sizes / 2], 2)
        found = []
        for i in range(len(images)):
            keep = suppressed(corners[i].detach(), scores[i].detach(), 0.4)[:8]
            seen = torch.cat([features[i].flatten(1).T[keep], corners[i][keep]], 1)
            out = self.head(seen)
            wanted = truth[i].expand(len(keep), 4)
            found.append(
                functional.cross_entropy(out[:, :CLASSES], kinds[i].expand(len(keep)))
                + functional.smooth_l1_loss(corners[i][keep] + out[:, CLASSES:], wanted)
            )
        first = functional.smooth_l1_loss(corners, truth[:, None].expand_as(corners))
        return {"loss": torch.stack(found).mean() + first + functional.softplus(-scores).mean()}


def by_hand() -> Training:
    """A detector of two stages, with ``nms`` in Python."""
    batches = []
    for i in range(4):
        kinds, boxes = zip(*_objects(i, 1), strict=True)
        truth = torch.cat([torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1) for b in boxes])
        batches.append({"images": _images(i), "kinds": torch.cat(kinds), "truth": truth})
    return Training(Detector(), batches, lambda result: result["loss"], sgd)


class SummedLosses(nn.Module):
    """A detector of torchvision, by keyword, which gives the sum of its losses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """The sum."""
        losses: dict[str, Tensor] = self.model(images, targets)
        return torch.stack(list(losses.values())).sum()


def _of_torchvision(name: str) -> Training:
    """A detector of torchvision with a small ResNet."""
    import torchvision
    from torchvision.models.detection import backbone_utils

    body = torchvision.models.resnet18(weights=None, norm_layer=nn.BatchNorm2d)
    del body.fc
    fpn = backbone_utils._resnet_fpn_extractor(body, 5)
    options: dict[str, Any] = {"num_classes": CLASSES + 1, "min_size": 64, "max_size": 64}
    if name == "FasterRCNN":
        options |= {"rpn_pre_nms_top_n_train": 40, "rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 16}
    model = getattr(torchvision.models.detection, name)(fpn, **options)
    batches = []
    for i in range(4):
        targets = []
        for kinds, boxes in _objects(i):
            corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
            targets.append({"boxes": 64 * corners, "labels": 1 + kinds})
        draw = torch.Generator().manual_seed(i)
        batches.append({"images": list(torch.rand(BATCH, 3, 64, 64, generator=draw)), "targets": targets})
    return Training(SummedLosses(model), batches, lambda loss: loss, lambda p: torch.optim.SGD(p, lr=1e-3))


def faster_rcnn() -> Training:
    """Faster R-CNN of torchvision, which draws its samples at random."""
    return _of_torchvision("FasterRCNN")


MAKERS: Mapping[str, Maker] = {"DETR": detr, "detector with nms": by_hand, "Faster R-CNN": faster_rcnn}
