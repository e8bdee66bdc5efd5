"""Models of transformers that read text with images in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twenty_parts.language import BATCH, SMALL_TEXT, tokens
from twenty_parts.training import Maker, Training, adamw, sgd

IMAGE = 90
"""The token that stands where an image is; text has smaller ones here."""


def _with_images(seed: int, number: int, start: int = 1) -> dict[str, Tensor]:
    """Tokens in which the image of each sample takes so many places."""
    ids = tokens(seed) % 80 + 3
    image = torch.full((BATCH, number), IMAGE)
    ids = torch.cat([ids[:, :start], image, ids[:, start:]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == IMAGE, -100)}


def _pixels(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llava() -> Training:
    """LLaVA: CLIP's patches in the place of image tokens of a Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=16
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SMALL_TEXT), image_token_index=IMAGE)
    batches = [{**_with_images(i, 4), "pixel_values": _pixels(i, BATCH, 3, 32, 32)} for i in range(4)]
    return Training(LlavaForConditionalGeneration(config), batches, None, adamw)


def qwen2_vl() -> Training:
    """Qwen2-VL, whose images differ in size."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {**SMALL_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3,
    )  # fmt: skip
    grid = torch.tensor([[1, 4, 4], [1, 2, 8], [1, 8, 2], [1, 4, 4]])
    batches = []
    for i in range(4):
        batch = _with_images(i, 4)
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
        batches.append({**batch, "pixel_values": _pixels(i, 64, 3 * 2 * 4 * 4), "image_grid_thw": grid.roll(i, 0)})
    return Training(Qwen2VLForConditionalGeneration(config), batches, None, sgd)


def gemma3() -> Training:
    """Gemma 3, whose attention goes both ways within an image."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**SMALL_TEXT, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 8, "model_type": "siglip_vision_model"}  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=IMAGE + 1, eoi_token_index=IMAGE + 2,
    )  # fmt: skip
    batches = []
    for i in range(4):
        batch = _with_images(i, 4)
        batch["token_type_ids"] = (batch["input_ids"] == IMAGE).long()
        batches.append({**batch, "pixel_values": _pixels(i, BATCH, 3, 32, 32)})
    return Training(Gemma3ForConditionalGeneration(config), batches, None, sgd)


MAKERS: Mapping[str, Maker] = {"LLaVA": llava, "Qwen2-VL": qwen2_vl, "Gemma 3": gemma3}
