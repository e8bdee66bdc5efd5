"""Architectures of transformers, from their configurations."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from sweep_parts.harness import Architecture, NotRunnable, Sample
from sweep_parts.inputs import calls_of
from sweep_parts.overrides import OVERRIDES
from sweep_parts.shrink import shrunk

HEADS = (
    "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "CTC", "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION",
    "MULTIMODAL_LM", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION",
    "TIME_SERIES_PREDICTION", "MASKED_IMAGE_MODELING", "PRETRAINING", "QUESTION_ANSWERING", "",
)  # fmt: skip
"""Kinds of models, the first that an architecture has is tried; the last is the model without a head."""

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
    return Sample(model, calls_of(model, config))
