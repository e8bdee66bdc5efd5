"""Well-known models by short name: the class and configuration that transformers builds them from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = tuple[str, Mapping[str, Any]]
"""Name of a class of transformers, and the values that its configuration gets."""


def _gpt2(width: int, layers: int, heads: int) -> Preset:
    return "GPT2LMHeadModel", {"n_embd": width, "n_layer": layers, "n_head": heads}


def _bert(width: int, layers: int, heads: int) -> Preset:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return "BertForMaskedLM", {**sizes, "intermediate_size": 4 * width}


def _llama(width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> Preset:
    return "LlamaForCausalLM", {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
    }


def _vit(width: int, layers: int, heads: int) -> Preset:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return "ViTForImageClassification", {**sizes, "intermediate_size": 4 * width, "num_labels": 1000}


def _resnet(depths: list[int], kind: str, sizes: list[int]) -> Preset:
    return "ResNetForImageClassification", {
        "depths": depths,
        "layer_type": kind,
        "hidden_sizes": sizes,
        "num_labels": 1000,
    }


PRESETS: Mapping[str, Preset] = {
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-tiny": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 256, "n_positions": 128},
    ),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "resnet-18": _resnet([2, 2, 2, 2], "basic", [64, 128, 256, 512]),
    "resnet-50": _resnet([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
    "vit-base": _vit(768, 12, 12),
    "vit-large": _vit(1024, 24, 16),
}
"""Sizes as published: Radford et al. (2019), Devlin et al. (2019), Touvron et al. (2023), Dubey et al. (2024),
He et al. (2016), Dosovitskiy et al. (2021)."""
