"""What configurations of transformers need beside small sizes, so that their parts fit one another."""

from __future__ import annotations

from typing import Any

_PLAIN_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_ROTARY = {"rope_parameters": {**_PLAIN_ROTARY, "mrope_section": [2, 1, 1]}}
_TWO_STAGES = {"depths": [1, 1], "num_heads": [2, 2]}
_HGNET = {
    "stem_channels": [3, 16, 16], "stage_in_channels": [16, 16, 32, 32], "stage_mid_channels": [16] * 4,
    "stage_out_channels": [16, 32, 32, 32], "hidden_sizes": [16, 32, 32, 32], "stage_numb_of_layers": [1] * 4,
}  # fmt: skip
_FOUR_STAGES = {"num_hidden_layers": 4, "out_features": None, "out_indices": [1, 2, 3, 4]}
_EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320}
_ONE_HEAD_EACH = {"num_key_value_heads": 4}
_LETTERS = {f"IMGIMG{letter}Z": 60 + i for i, letter in enumerate("ABCD")}

OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {"vision_config": _EFFICIENT},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": {"prediction_length": 8, "label_length": 2, "context_length": 16},
    "bit": {"num_groups": 4},
    "blip-2": {"image_token_index": 90},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "bros": {"hidden_size": 64},
    "chameleon": {
        "vocabulary_map": {"<image>": 90, **_LETTERS},
        "vq_config": {"num_embeddings": 4, "base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": None},
    },
    "cvt": {"depth": [1, 2, 3]},
    "d_fine": {"backbone_config": _HGNET, "encoder_in_channels": [32] * 3, "decoder_in_channels": [32] * 3},
    "dbrx": {"rope_parameters": _PLAIN_ROTARY, "attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": _ONE_HEAD_EACH,
    "deepseek_v3": _ONE_HEAD_EACH,
    "depth_anything": {"backbone_config": _FOUR_STAGES},
    "donut-swin": _TWO_STAGES,
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "efficientnet": _EFFICIENT,
    "falcon_h1": {"mamba_d_ssm": 64},
    "esm": {"pad_token_id": 1, "mask_token_id": 90},
    "gemma3n_text": {"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hgnet_v2": _HGNET,
    "informer": {"prediction_length": 8},
    "instructblip": {"image_token_index": 90},
    "kimi_linear": _ONE_HEAD_EACH,
    "levit": {"image_size": 64, "patch_size": 16},
    "lilt": {"hidden_size": 48},
    "longcat_flash": _ONE_HEAD_EACH,
    "mamba2": {"num_heads": 8},
    "maskformer-swin": _TWO_STAGES,
    "mllama": {"vision_config": {"vision_output_dim": 96}},
    "mobilebert": {"intra_bottleneck_size": 32},
    "mobilevitv2": {"image_size": 64},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2},
    "qwen2_5_vl": {"text_config": _ROTARY, "vision_config": {"window_size": 32}},
    "qwen2_vl": {"text_config": _ROTARY},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2, "hash_seed": 0,
    },
    "rt_detr": {"encoder_in_channels": [32] * 3, "decoder_in_channels": [32] * 3},
    "swin": _TWO_STAGES,
    "swinv2": _TWO_STAGES,
    "textnet": {"stem_out_channels": 16},
    "time_series_transformer": {"prediction_length": 8},
    "vits": {"upsample_initial_channel": 32, "spectrogram_bins": 33, "duration_predictor_filter_channels": 32},
    "wav2vec2": {"ctc_loss_reduction": "mean"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zoedepth": {"backbone_config": _FOUR_STAGES},
}  # fmt: skip
"""By the name of the architecture."""
