"""A configuration of transformers with small sizes, whatever it calls them."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 99

# The first pattern that a name matches says its size; what no pattern matches stays.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size|input_vocab_size|n_vocab|num_tokens|n_words", VOCABULARY),
    (r"num_key_value_heads|n_kv_heads|num_kv_heads|multi_query_group_num|attention_num_kv_heads", 2),
    (r"(.*_)?(num_)?attention_heads|n_heads?|num_heads|attn_heads|num_query_heads|(encoder|decoder)_heads", 4),
    (r"index_n_heads|linear_num_(key|value)_heads|num_(key|value)_heads", 4),
    (r"(.*_)?num_(.*_)?hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|num_blocks|n_blocks", 2),
    (r"num_(encoder|decoder)_layers|(vision|text|encoder|decoder)_num_layers|(.*_)?depth|num_hidden_groups", 2),
    (r"(.*_)?(intermediate|ffn|mlp)_(size|dim|hidden_size)|d_ff|(en|de)coder_ffn_dim|d_inner|mlp_dim", 48),
    (r"(.*_)?ffn_hidden_size|dim_feedforward|(shared_)?expert_intermediate_size|feed_forward_proj_dim", 48),
    (
        r"(.*_)?hidden_size|d_model|n_embd|embed_dim|(.*_)?hidden_dim|(.*_)?embedding_size|dim|emb_dim|word_embed_proj_dim",
        32,
    ),
    (
        r"projection_dim|(.*_)?proj_dim|embedding_dim|d_embed|encoder_dim|classifier_proj_size|num_feature_levels_dim",
        32,
    ),
    (
        r"head_dim|d_kv|attention_head_size|global_head_dim|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim",
        8,
    ),
    (r"linear_(key|value)_head_dim|mamba_d_head|mamba_head_dim|attention_head_dim", 8),
    (r"q_lora_rank|kv_lora_rank|state_size|mamba_d_state|ssm_state_size|rotary_dim|index_topk", 8),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|experts_per_token|moe_k|top_k_experts|num_selected_experts", 2),
    (r"n_group|topk_group|n_shared_experts|first_k_dense_replace|moe_layer_start_index", 1),
    (r"max_position_embeddings|n_positions|max_source_positions|max_target_positions|n_ctx|max_seq_len|seq_length", 64),
    (r"image_size|img_size|input_size|pretrain_image_size", 32),
    (r"num_kv_shared_layers", 0),
    (r"projection_size", 32),
    (r"(.*_)?patch_size", 8),
    (r"mm_tokens_per_image|latent_query_num", 4),
    (r"num_mel_bins|num_queries|num_query_tokens", 16),
    (r"sliding_window|attention_window_size|window_size|local_attention|chunk_size|mamba_chunk_size", 4),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"num_conv_pos_embeddings", 8),
    (r"num_conv_pos_embedding_groups", 2),
    (r"type_vocab_size|num_labels", 2),
)
TOKENS = r".*_token_(id|index)|.*_token_id|image_token_index|bos|eos|pad"
UNSAID = r"vocab_size|head_dim|num_key_value_heads|n_routed_experts|n_shared_experts|num_experts_per_tok"
"""Sizes that some configurations leave open, and yet need."""
MARKS = r"(image|video|audio|vision|media|speech)_"
"""What stands for other things than words, which no text has by chance."""
ZERO = r".*(dropout|_drop|pdrop|layerdrop|drop_path_rate|drop_rate|jitter_noise)(_prob|_rate)?|mask_(time|feature)_prob"


BACKBONE = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
"""In the place of a backbone that timm would give."""


def shrunk(config_class: Any, overrides: dict[str, Any] | None = None) -> Any:
    """A small configuration of a class; its inner configurations are shrunk, too."""
    return config_class(**_merged(_small_values(config_class()), overrides or {}))


def _merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Values with others in their place, in inner configurations too."""
    return values | {
        name: _merged(values[name], value) if isinstance(value, dict) and isinstance(values.get(name), dict) else value
        for name, value in over.items()
    }


def _small_values(config: Any) -> dict[str, Any]:
    """What is to be set in a configuration for it to be small."""
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            inner = value.to_dict() | _small_values(value)
            values[name] = _backbone(config, name) if value.model_type == "timm_backbone" else inner
        elif (small := _small(name, value)) is not None:
            values[name] = small
        elif isinstance(value, dict) and "mrope_section" in value:
            values[name] = value | {"mrope_section": [2, 1, 1]}
    layers = values.get("num_hidden_layers", values.get("n_layer", 2))
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "layer_type"):
        kinds = vars(config).get(name)
        if isinstance(kinds, list) and kinds:
            values[name] = _mixed(kinds, layers)
    return values


def _backbone(config: Any, name: str) -> dict[str, Any]:
    """A small one with the stages that a model asks of one of transformers' own."""
    spec = getattr(type(config), "sub_configs_defaults", {}).get(name)
    return {**BACKBONE, **(getattr(spec, "init_kwargs", None) or {"out_features": ["stage4"]})}


def _small(name: str, value: Any) -> Any:
    """A smaller value; None where it stays."""
    if isinstance(value, float) and re.fullmatch(ZERO, name):
        return 0.0
    if name in ("use_cache",):
        return False
    if value is None and re.fullmatch(UNSAID, name):
        return next(size for pattern, size in SIZES if re.fullmatch(pattern, name))
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        if re.fullmatch(TOKENS, name):
            is_word = 0 <= value < VOCABULARY and not re.match(MARKS, name)
            return value if is_word else VOCABULARY - 2 - sum(map(ord, name)) % 40
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                return min(size, value) if value > 0 else None
        return None
    if name == "image_grid_pinpoints" and value:
        return [[32, 32]]
    if isinstance(value, (list, tuple)) and value and all(type(x) is int for x in value):
        kind = type(value)
        if re.fullmatch(r"depths?|num_layers|layers|encoder_depths|num_blocks|stage_num_blocks", name):
            return kind([1] * len(value))
        if re.fullmatch(r"(.*hidden_sizes|embed_dims?|hidden_dims?|.*channels|dims?|widths|out_channels)", name):
            return kind([16 * (1 + (x > min(value))) if len(value) > 1 else 16 for x in value])
        if re.fullmatch(r"num_(attention_)?heads|num_attention_heads", name):
            return kind([min(x, 2) for x in value])
        if re.fullmatch(r".*(indexes|indices|layer_ids|layers_ids)", name):
            return kind(sorted({min(x, i) for i, x in enumerate(value[:2])}))
        if name in ("conv_dim",):
            return kind([16] * len(value))
        if re.fullmatch(r"(image|img)_size", name):
            return kind([32] * len(value))
    return None


def _mixed(kinds: list[str], count: int) -> list[str]:
    """So many kinds of layers, as different as there are."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct * count)[:count]
