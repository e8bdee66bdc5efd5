"""Architectures of transformers, from their configurations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sweep_parts.harness import Architecture, NotRunnable, Sample
from sweep_parts.shrink import VOCABULARY, shrunk

BATCH, LENGTH = 4, 8
HEADS = (
    "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "TIME_SERIES_PREDICTION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "MASKED_IMAGE_MODELING", "PRETRAINING", "QUESTION_ANSWERING", "",
)  # fmt: skip
"""Kinds of models, the first that an architecture has is tried; the last is the model without a head."""

WAVE = 3200

CHOSEN = (
    "gpt2", "bert", "llama", "t5", "vit", "resnet", "wav2vec2", "whisper", "bart", "mixtral", "clip",
    "convnext", "swin", "detr", "bloom", "opt", "gpt_neo", "gpt_neox", "gptj", "distilbert", "roberta",
    "albert", "electra", "xlm-roberta", "deberta", "deberta-v2", "camembert", "ernie", "mpnet", "funnel",
    "longformer", "big_bird", "squeezebert", "layoutlm", "mobilebert", "nystromformer", "rembert", "roformer",
    "roc_bert", "splinter", "convbert", "data2vec-text", "esm", "fnet", "ibert", "luke", "lilt",
    "megatron-bert", "mra", "xlm", "xlnet", "xmod", "yoso", "xlm-roberta-xl", "roberta-prelayernorm",
    "bert-generation", "bros", "flaubert", "canine", "perceiver", "reformer", "tapas", "markuplm", "nomic_bert",
    "modernbert", "modernbert-decoder", "eurobert", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "qwen2",
    "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next", "mistral", "ministral", "phi", "phi3", "phimoe", "olmo",
    "olmo2", "olmo3", "olmoe", "stablelm", "starcoder2", "falcon", "falcon_h1", "falcon_mamba", "mamba",
    "mamba2", "jamba", "bamba", "zamba", "zamba2", "rwkv", "recurrent_gemma", "granite", "granitemoe",
    "granitemoeshared", "granitemoehybrid", "cohere", "cohere2", "glm", "glm4", "glm4_moe", "helium", "exaone4",
    "ernie4_5", "ernie4_5_moe", "smollm3", "seed_oss", "nemotron", "persimmon", "mpt", "codegen", "ctrl",
    "openai-gpt", "biogpt", "bitnet", "gpt_bigcode", "gpt_neox_japanese", "imagegpt", "xglm", "trocr", "dbrx",
    "jetmoe", "minimax", "hunyuan_v1_dense", "hunyuan_v1_moe", "arcee", "apertus", "deepseek_v2", "deepseek_v3",
    "diffllama", "doge", "dots1", "flex_olmo", "gpt_oss", "lfm2", "longcat_flash", "nanochat", "vaultgemma",
    "xlstm", "blt", "llama4_text", "moshi", "cwm", "afmoe", "kimi_linear", "mt5", "umt5", "mbart", "pegasus",
    "pegasus_x", "bigbird_pegasus", "blenderbot", "blenderbot-small", "led", "longt5", "m2m_100", "marian",
    "mvp", "nllb-moe", "plbart", "prophetnet", "switch_transformers", "t5gemma", "fsmt", "deit", "beit",
    "data2vec-vision", "bit", "convnextv2", "cvt", "dinov2", "dinov2_with_registers", "efficientnet",
    "focalnet", "hiera", "levit", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "poolformer",
    "pvt", "pvt_v2", "regnet", "segformer", "swiftformer", "swinv2", "textnet", "vit_msn", "ijepa",
    "dinov3_vit", "hgnet_v2", "vit_mae", "videomae", "vivit", "timesformer", "vjepa2", "dpt", "glpn", "upernet",
    "zoedepth", "depth_anything", "yolos", "conditional_detr", "deformable_detr", "rt_detr", "d_fine",
    "mask2former", "maskformer", "hubert", "wavlm", "unispeech", "unispeech-sat", "sew", "sew-d",
    "data2vec-audio", "wav2vec2-bert", "wav2vec2-conformer", "audio-spectrogram-transformer", "speech_to_text",
    "speecht5", "moonshine", "parakeet_ctc", "vits", "siglip", "siglip2", "blip", "align", "altclip",
    "chinese_clip", "clipseg", "owlvit", "flava", "groupvit", "git", "vilt", "llava", "llava_next",
    "llava_onevision", "paligemma", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics2", "idefics3",
    "smolvlm", "internvl", "aya_vision", "mistral3", "mllama", "kosmos-2", "blip-2", "instructblip",
    "chameleon", "fuyu", "aria", "patchtst", "patchtsmixer", "time_series_transformer", "autoformer",
    "informer", "decision_transformer",
)  # fmt: skip
"""What is tried, of each family of transformers; the first are tried first."""
OVERRIDES: dict[str, dict[str, Any]] = {
    "wav2vec2": {"ctc_loss_reduction": "mean"},
}
"""What a configuration needs beside small sizes."""


def architectures(_: str) -> Mapping[str, Architecture]:
    """Those chosen that have a model of a kind in :data:`HEADS`."""
    from transformers.models.auto import configuration_auto, modeling_auto

    heads = [
        getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES") for head in HEADS
    ]
    found = {}
    for name in filter(configuration_auto.CONFIG_MAPPING_NAMES.__contains__, CHOSEN):
        model = next((mapping[name] for mapping in heads if name in mapping), None)
        if model is not None:
            found[name] = functools.partial(_build, name, model if isinstance(model, str) else model[0])
    return found


def _build(name: str, model_name: str) -> Sample:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = shrunk(CONFIG_MAPPING[name], OVERRIDES.get(name))
    model_class = getattr(transformers, model_name)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > 5_000_000:
        raise NotRunnable(f"too large: {size} parameters")
    model = model_class(config)
    return Sample(model, (_inputs(model, config, 0), _inputs(model, config, 1)))


def _inputs(model: Any, config: Any, seed: int) -> dict[str, Tensor]:
    """The main input, and labels where the model takes some."""
    draw = torch.Generator().manual_seed(seed)
    takes = inspect.signature(model.forward).parameters
    found: dict[str, Tensor] = {}
    words = min(VOCABULARY // 2, getattr(config, "vocab_size", None) or VOCABULARY)
    ids = torch.randint(3, words, (BATCH, LENGTH), generator=draw)
    main = model.main_input_name
    if main == "pixel_values" or (main not in takes and "pixel_values" in takes):
        found["pixel_values"] = _pixels(config, draw)
    elif main in ("input_values", "input_features"):
        found[main] = _sound(config, main, draw)
    elif "input_ids" in takes:
        found["input_ids"] = ids
    else:
        raise NotRunnable(f"its main input is {main}")
    if "pixel_values" in takes and "image_token_id" not in dir(config) and hasattr(config, "vision_config"):
        found["pixel_values"] = _pixels(config.vision_config, draw)
    if "decoder_input_ids" in takes:
        found["decoder_input_ids"] = torch.randint(3, words, (BATCH, 5), generator=draw)
    kind = type(model).__name__
    if "labels" in takes:
        if kind.endswith(("CausalLM", "MaskedLM", "LMHeadModel")) and "input_ids" in found:
            found["labels"] = ids
        elif kind.endswith(("ForConditionalGeneration", "Seq2SeqLM", "CTC")):
            is_plain = "decoder_input_ids" in found or "input_ids" not in found
            found["labels"] = found.get("decoder_input_ids", ids[:, :4]) if is_plain else ids
        elif "Classification" in kind:
            found["labels"] = torch.randint(0, config.num_labels, (BATCH,), generator=draw)
    return found


def _pixels(config: Any, draw: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", None) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frames = [getattr(config, "num_frames", None)] if getattr(config, "num_frames", None) else []
    return torch.randn(BATCH, *frames, getattr(config, "num_channels", 3) or 3, height, width, generator=draw)


def _sound(config: Any, main: str, draw: torch.Generator) -> Tensor:
    if main == "input_values" and not hasattr(config, "num_mel_bins"):
        return torch.randn(BATCH, WAVE, generator=draw)
    bins = next(
        (getattr(config, n) for n in ("num_mel_bins", "feature_size", "input_feat_per_channel") if hasattr(config, n)),
        16,
    )
    if hasattr(config, "max_source_positions") and type(config).__name__.startswith("Whisper"):
        return torch.randn(BATCH, bins, 2 * config.max_source_positions, generator=draw)
    length = getattr(config, "max_length", 64) if main == "input_values" else 64
    return torch.randn(BATCH, length, bins, generator=draw)
