"""Denoisers and autoencoders of diffusers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from sweep_parts.harness import Architecture, Sample

BATCH = 4
WIDE = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D")
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}

MODELS: Mapping[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "UNet2DModel": (
        {**WIDE, "sample_size": 16, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8},
        {"sample": (BATCH, 3, 16, 16), "timestep": (BATCH,)},
    ),
    "UNet2DConditionModel": (
        {**WIDE, "sample_size": 16, "down_block_types": DOWN, "up_block_types": UP, "cross_attention_dim": 16,
         "attention_head_dim": 8},
        {"sample": (BATCH, 4, 16, 16), "timestep": (BATCH,), "encoder_hidden_states": (BATCH, 5, 16)},
    ),
    "ControlNetModel": (
        {**WIDE, "down_block_types": DOWN, "cross_attention_dim": 16, "attention_head_dim": 8,
         "conditioning_embedding_out_channels": (8, 16)},
        {"sample": (BATCH, 4, 16, 16), "timestep": (BATCH,), "encoder_hidden_states": (BATCH, 5, 16),
         "controlnet_cond": (BATCH, 3, 32, 32)},
    ),
    "AutoencoderKL": (
        {**WIDE, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        {"sample": (BATCH, 3, 16, 16)},
    ),
    "AsymmetricAutoencoderKL": (
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
         "down_block_out_channels": (16, 32), "up_block_out_channels": (16, 32), "norm_num_groups": 4},
        {"sample": (BATCH, 3, 16, 16)},
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (16,) * 2, "decoder_block_out_channels": (16,) * 2,
         "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        {"sample": (BATCH, 3, 16, 16)},
    ),
    "VQModel": (
        {**WIDE, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        {"sample": (BATCH, 3, 16, 16)},
    ),
    "UNet1DModel": (
        {"block_out_channels": (16, 32), "extra_in_channels": 16, "sample_size": 32,
         "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"), "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip")},
        {"sample": (BATCH, 2, 32), "timestep": (BATCH,)},
    ),
    "SD3Transformer2DModel": (
        {**HEADS, "sample_size": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2, "joint_attention_dim": 16,
         "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8},
        {"hidden_states": (BATCH, 4, 16, 16), "encoder_hidden_states": (BATCH, 5, 16),
         "pooled_projections": (BATCH, 16), "timestep": (BATCH,)},
    ),
    "PixArtTransformer2DModel": (
        {**HEADS, "sample_size": 16, "in_channels": 4, "out_channels": 8, "patch_size": 2, "cross_attention_dim": 16,
         "caption_channels": 16, "use_additional_conditions": False},
        {"hidden_states": (BATCH, 4, 16, 16), "encoder_hidden_states": (BATCH, 5, 16), "timestep": (BATCH,)},
    ),
    "SanaTransformer2DModel": (
        {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "patch_size": 1, "cross_attention_dim": 16,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "caption_channels": 16},
        {"hidden_states": (BATCH, 4, 8, 8), "encoder_hidden_states": (BATCH, 5, 16), "timestep": (BATCH,)},
    ),
    "PriorTransformer": (
        {**HEADS, "embedding_dim": 16, "num_embeddings": 5},
        {"hidden_states": (BATCH, 16), "timestep": (BATCH,), "proj_embedding": (BATCH, 16),
         "encoder_hidden_states": (BATCH, 5, 16)},
    ),
    "AuraFlowTransformer2DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "sample_size": 16, "joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 64},
        {"hidden_states": (BATCH, 4, 16, 16), "encoder_hidden_states": (BATCH, 5, 16), "timestep": (BATCH,)},
    ),
}  # fmt: skip


def architectures(_: str) -> Mapping[str, Architecture]:
    """The classes listed here."""
    return {name: functools.partial(_build, name) for name in MODELS}


def _build(name: str) -> Sample:
    import diffusers

    options, shapes = MODELS[name]
    model = getattr(diffusers, name)(**options)
    return Sample(model, (_inputs(shapes, 0), _inputs(shapes, 1)))


def _inputs(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(1, 900, shape, generator=draw) if name == "timestep" else torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
    }
