"""Language models of transformers: with experts, and with positions by ALiBi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from twenty_parts.training import Maker, Training, adamw, sgd

VOCABULARY, BATCH, LENGTH = 96, 4, 10


def tokens(seed: int, low: int = 3) -> Tensor:
    """Random tokens of shape [batch, length]."""
    return torch.randint(low, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def padded(seed: int) -> dict[str, Tensor]:
    """Tokens, some of them padding at the end, whose labels do not count."""
    ids = tokens(seed)
    lengths = torch.tensor([LENGTH, LENGTH - 1 - seed % 3, LENGTH - 4, LENGTH])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def mixtral() -> Training:
    """Mixtral with its router's auxiliary loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return Training(MixtralForCausalLM(config), [padded(seed) for seed in range(4)], None, sgd)


def jetmoe() -> Training:
    """JetMoE, whose attention has experts, too."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_key_value_heads=2, kv_channels=8,
        intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return Training(JetMoeForCausalLM(config), [padded(seed) for seed in range(4)], None, sgd)


def bloom() -> Training:
    """BLOOM."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, use_cache=False)
    return Training(BloomForCausalLM(config), [padded(seed) for seed in range(4)], None, adamw)


MAKERS: Mapping[str, Maker] = {"Mixtral": mixtral, "JetMoE": jetmoe, "BLOOM": bloom}
SMALL_TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip
"""A decoder of text, as models of text and images take it."""
