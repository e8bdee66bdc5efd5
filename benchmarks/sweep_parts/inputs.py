"""Arguments for models of transformers, from what their ``forward`` takes and what their configurations say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sweep_parts.harness import NotRunnable
from sweep_parts.shrink import VOCABULARY

BATCH, LENGTH, TARGETS = 4, 8, 5
WAVE = 3200
GRID = 4
"""Patches along each side of an image that is given as patches."""

Arguments = dict[str, Any]
Maker = Callable[[Any, Any, torch.Generator], Arguments]


def calls_of(model: Any, config: Any) -> tuple[Arguments, Arguments]:
    """Arguments of two calls, in the first form that the model runs with.

    Raises:
        NotRunnable: if it runs with none.
    """
    reasons = []
    takes = inspect.signature(model.forward).parameters
    for maker, labelled in ((maker, labelled) for maker in _makers(model, takes) for labelled in (True, False)):
        try:
            found = [_call(maker, model, config, seed, labelled) for seed in (0, 1)]
            with torch.no_grad():
                model(**found[0])
        except Exception as reason:
            reasons.append(f"{' '.join(str(reason).split())[:120]} ({type(reason).__name__} as {maker.__name__[1:]})")
            continue
        return found[0], found[1]
    raise NotRunnable("; ".join(reasons) or f"its main input is {model.main_input_name}")


def _makers(model: Any, takes: Mapping[str, Any]) -> Iterator[Maker]:
    main = model.main_input_name
    if "pixel_values" in takes and "input_ids" in takes:
        yield from (_image_in_text, _image_of_size_in_text, _patches_in_text, _images_in_text)
        yield from (_image_beside_text, _tiles_beside_text, _patches_beside_text)
    if "past_values" in takes:
        yield _series
    elif main == "pixel_values_videos" or (main not in takes and "pixel_values_videos" in takes):
        yield _video
    elif main == "pixel_values" or (main not in takes and "pixel_values" in takes):
        yield from (_image, _patches)
    elif main == "flattened_patches":
        yield _flat_patches
    elif main in ("input_values", "input_features") and main in takes:
        yield from (_wave, _spectrum, _long_spectrum)
    elif "states" in takes and "returns_to_go" in takes:
        yield _decisions
    if {"input_features", "input_ids"} <= takes.keys() or {"input_values", "input_ids"} <= takes.keys():
        yield from (_sound_in_text, _sound_beside_text)
    if "input_ids" in takes:
        yield _text


def _call(maker: Maker, model: Any, config: Any, seed: int, labelled: bool) -> Arguments:
    """What a maker gives and the model takes, with labels if wanted."""
    draw = torch.Generator().manual_seed(seed)
    takes = inspect.signature(model.forward).parameters
    found = {name: value for name, value in maker(model, config, draw).items() if name in takes}
    decoder = getattr(config, "decoder", None) or config
    if "decoder_input_ids" in takes:
        shape = (BATCH, channels, TARGETS) if (channels := getattr(decoder, "num_codebooks", 0)) else (BATCH, TARGETS)
        found["decoder_input_ids"] = torch.randint(3, _words(decoder), shape, generator=draw)
    if "bbox" in takes:
        corners = torch.randint(0, 30, (BATCH, LENGTH, 2), generator=draw)
        wide = torch.cat([corners, corners + 5], -1)
        is_unit = getattr(config, "bbox_scale", None) is not None
        found["bbox"] = torch.rand(BATCH, LENGTH, 8, generator=draw) if is_unit else wide
    if "return_loss" in takes:
        found["return_loss"] = True
    return found | (_labels(model, config, takes, found, draw) if labelled else {})


def _labels(model: Any, config: Any, takes: Mapping[str, Any], found: Arguments, draw: torch.Generator) -> Arguments:
    kind, ids = type(model).__name__, found.get("input_ids")
    if "mask_labels" in takes:
        masks = [(torch.rand(2, 32, 32, generator=draw) > 0.5).float() for _ in range(BATCH)]
        return {"mask_labels": masks, "class_labels": [torch.tensor([0, 1]) for _ in range(BATCH)]}
    if "start_positions" in takes and ids is not None:
        return {
            name: torch.randint(0, LENGTH, (BATCH,), generator=draw) for name in ("start_positions", "end_positions")
        }
    if "labels" not in takes:
        return {}
    if kind.endswith("ObjectDetection"):
        boxes = [torch.rand(2, 4, generator=draw) * 0.4 + 0.2 for _ in range(BATCH)]
        return {"labels": [{"class_labels": torch.tensor([0, 1]), "boxes": b} for b in boxes]}
    if kind.endswith(("SemanticSegmentation", "DepthEstimation")):
        return {"labels": torch.randint(0, config.num_labels, (BATCH, 32, 32), generator=draw)}
    if kind.endswith(("CTC", "RNNT", "TDT")):
        return {"labels": torch.randint(3, _words(config), (BATCH, 4), generator=draw)}
    if "decoder_input_ids" in found:
        return {"labels": found["decoder_input_ids"]} if "Classification" not in kind else {}
    if ids is not None and kind.endswith(("LM", "Generation", "LMHeadModel", "Seq2SeqLM", "PreTraining", "Text2Text")):
        return {"labels": ids}
    if ids is None and kind.endswith("Generation"):
        return {"labels": torch.randint(3, _words(config), (BATCH, TARGETS), generator=draw)}
    if "Classification" in kind:
        return {"labels": torch.randint(0, config.num_labels, (BATCH,), generator=draw)}
    return {}


# --- words --------------------------------------------------------------------------------------------------------


def _words(config: Any) -> int:
    """Ids below are words: what stands for images and the like has larger ones."""
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = [n for n in (getattr(c, "vocab_size", None) for c in (inner, config)) if isinstance(n, int)]
    return min(VOCABULARY // 2, *sizes) if sizes else VOCABULARY // 2


def _ids(config: Any, draw: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(3, _words(config), (BATCH, length), generator=draw)


def _text(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    length = max(LENGTH, *(getattr(config, n, 0) or 0 for n in ("local_attn_chunk_length", "min_length_of_text")))
    if hasattr(config, "axial_pos_shape"):
        length = config.axial_pos_shape[0] * config.axial_pos_shape[1]
    found = {"input_ids": _ids(config, draw, length)}
    if hasattr(config, "question_token_id"):
        found["input_ids"][:, 1] = config.question_token_id
    for name in ("input_shape_ids", "input_pronunciation_ids"):
        found[name] = torch.randint(0, 16, (BATCH, length), generator=draw)
    found["input_ids_masked"] = found["input_ids"]
    return found


# --- images -------------------------------------------------------------------------------------------------------


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config


def _pixels(config: Any, draw: torch.Generator, *outer: int) -> Tensor:
    size = getattr(config, "image_size", None) or getattr(config, "img_size", None) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    return torch.randn(BATCH, *outer, channels, height, width, generator=draw)


def _image(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    vision = _vision(config)
    frames = getattr(vision, "num_frames", None)
    pixels = _pixels(vision, draw, *([frames] if frames else []))
    found = {"pixel_values": pixels, "task_inputs": _ids(config, draw)}
    if hasattr(config, "prompt_depth_range") or "prompt_depth" in inspect.signature(model.forward).parameters:
        found["prompt_depth"] = torch.rand(BATCH, 1, 8, 8, generator=draw)
    found["prompt_pixel_values"], found["prompt_masks"] = pixels.flip(0), pixels.flip(1)
    if hasattr(config, "_sizes_of_images"):
        found["image_sizes"] = torch.tensor([pixels.shape[-2:]] * BATCH)
    points = torch.randint(0, 32, (BATCH, 1, 2, 2), generator=draw).float()
    found["input_points"], found["input_labels"] = points, torch.ones(BATCH, 1, 2, dtype=torch.long)
    return found


def _video(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    vision = _vision(config)
    frames = next((n for n in (getattr(vision, k, None) for k in ("num_frames", "frames_per_clip")) if n), 4)
    return {"pixel_values_videos": _pixels(vision, draw, frames)}


def _as_patches(config: Any, draw: torch.Generator) -> Arguments:
    """One image a sample in rows of pixels, a patch a row."""
    vision = _vision(config)
    side = vision.patch_size
    channels = next(
        (n for n in (getattr(vision, k, None) for k in ("in_channels", "in_chans", "num_channels")) if n), 3
    )
    width = channels * side * side * (getattr(vision, "temporal_patch_size", None) or 1)
    rows = torch.randn(BATCH * GRID * GRID, width, generator=draw)
    grid = torch.tensor([[1, GRID, GRID]] * BATCH)
    return {"pixel_values": rows, "hidden_states": rows, "image_grid_thw": grid, "grid_thw": grid}


def _patches(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    found = _as_patches(config, draw)
    takes = inspect.signature(model.forward).parameters
    if "spatial_shapes" in takes:
        rows = found["pixel_values"].view(BATCH, GRID * GRID, -1)
        mask = torch.ones(BATCH, GRID * GRID, dtype=torch.long)
        return {
            "pixel_values": rows,
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor([[GRID, GRID]] * BATCH),
        }
    return found


def _flat_patches(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    vision = _vision(config)
    width = getattr(vision, "num_channels", 3) * vision.patch_size**2
    places = torch.stack([torch.arange(1, 17) // 4, torch.arange(1, 17) % 4], -1).expand(BATCH, 16, 2)
    return {"flattened_patches": torch.cat([places.float(), torch.randn(BATCH, 16, width, generator=draw)], -1)}


def _image_beside_text(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    """An image and a text of which neither stands in the other."""
    found = {**_text(model, config, draw), **_image(model, config, draw)}
    found["image"], found["codebook_pixel_values"] = found["pixel_values"], found["pixel_values"]
    length = getattr(config, "num_query_tokens", None)
    if length and (image := _token(config, "image")) is not None:
        marks = torch.full((BATCH, length), image)
        found["input_ids"] = torch.cat([marks, found["input_ids"]], 1)
    if queries := getattr(config, "latent_query_num", 0):
        found["image_embeds_position_mask"] = (torch.arange(LENGTH) < queries).long().expand(BATCH, LENGTH).contiguous()
    found["qformer_input_ids"] = _ids(config, draw)
    found["bool_masked_pos"] = torch.zeros(BATCH, 16, dtype=torch.long)
    return found


def _image_in_text(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    return _in_text(model, config, draw, {"pixel_values": _pixels(_vision(config), draw)}, "image")


def _image_of_size_in_text(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    images = {"pixel_values": _pixels(_vision(config), draw), "image_sizes": torch.tensor([[32, 32]] * BATCH)}
    return _in_text(model, config, draw, images, "image")


def _images_in_text(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    """As models take it that know several images, or tiles of one, a sample."""
    tiles = 2 if getattr(config, "image_grid_pinpoints", None) else 1
    images = {
        "pixel_values": _pixels(_vision(config), draw, tiles),
        "image_sizes": torch.tensor([[32, 32]] * BATCH),
    }
    return _in_text(model, config, draw, images, "image")


def _tiles_beside_text(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    """Tiles of an image that a text attends to."""
    tiles = getattr(_vision(config), "max_num_tiles", 4)
    ones = torch.ones(BATCH, 1, tiles, dtype=torch.long)
    return {
        **_text(model, config, draw),
        "pixel_values": _pixels(_vision(config), draw, 1, tiles),
        "aspect_ratio_ids": ones[..., 0],
        "aspect_ratio_mask": ones,
        "cross_attention_mask": ones[:, None].expand(BATCH, LENGTH, 1, tiles).contiguous(),
    }


def _patches_in_text(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    return _in_text(model, config, draw, _as_patches(config, draw), "image")


def _patches_beside_text(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    return {**_text(model, config, draw), **_patches(model, config, draw)}


def _token(config: Any, what: str) -> int | None:
    """What stands for something in a text."""
    names = (f"{what}_token_id", f"{what}_token_index", f"media_{what}_token_id", "media_placeholder_token_id")
    found = [getattr(config, name, None) for name in names]
    return next((n for n in found if isinstance(n, int)), None)


def _in_text(model: Any, config: Any, draw: torch.Generator, given: Arguments, what: str) -> Arguments:
    """Something with a text that has a word in it for each feature."""
    token = _token(config, what)
    if token is None:
        raise NotRunnable(f"nothing stands for {what} in a text")
    owner = model if hasattr(model, f"get_{what}_features") else model.model
    read = getattr(owner, f"get_{what}_features")
    takes = inspect.signature(read).parameters
    wanted = inspect.signature(model.forward).parameters
    with torch.no_grad():
        found = read(**{name: value for name, value in given.items() if name in takes and name in wanted})
    features = next(
        (x for n in ("pooler_output", "last_hidden_state") if (x := getattr(found, n, None)) is not None), found
    )
    rows = [x for x in tree_leaves(features) if isinstance(x, Tensor)]
    width = model.get_input_embeddings().weight.shape[-1]
    count = sum(x.numel() for x in rows) // width // BATCH
    ids = _ids(config, draw, LENGTH + count)
    ids[ids == token] = 3 if token != 3 else 4
    ids[:, 3 : 3 + count] = token
    kinds = (ids == token).long()
    return {"input_ids": ids, "mm_token_type_ids": kinds, "token_type_ids": kinds, **given}


# --- sound --------------------------------------------------------------------------------------------------------


def _wave(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    wave = torch.randn(BATCH, WAVE, generator=draw)
    return {
        "input_values": wave if "padding_mask" not in inspect.signature(model.forward).parameters else wave[:, None]
    }


def _bins(config: Any) -> int:
    names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
    inner = (getattr(config, n, None) for n in ("audio_config", "encoder_config", "encoder"))
    found = [getattr(c, n, None) for c in (config, *inner) if c is not None for n in names]
    return next((n for n in found if isinstance(n, int)), 16)


def _frames(config: Any) -> int:
    """Twice what an encoder with learned positions has of these."""
    inner = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    return 2 * (getattr(inner, "max_source_positions", None) or 32)


def _spectrum(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    length = getattr(config, "max_length", 64) if model.main_input_name == "input_values" else 64
    spectrum = torch.randn(BATCH, length, _bins(config), generator=draw)
    return {"input_values": spectrum, "input_features": spectrum}


def _long_spectrum(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    return {"input_features": torch.randn(BATCH, _bins(config), _frames(config), generator=draw)}


def _sound_in_text(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    length = _frames(config)
    mask = torch.ones(BATCH, length, dtype=torch.long)
    given = {
        "input_features": torch.randn(BATCH, _bins(config), length, generator=draw),
        "input_features_mask": mask,
        "feature_attention_mask": mask,
    }
    return _in_text(model, config, draw, given, "audio")


def _sound_beside_text(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    return {**_text(model, config, draw), **_spectrum(model, config, draw)}


# --- other --------------------------------------------------------------------------------------------------------


def _series(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    length = getattr(config, "context_length", None) or 32
    past = length + max(getattr(config, "lags_sequence", None) or [0])
    future = getattr(config, "prediction_length", None) or 8
    width = getattr(config, "input_size", None) or getattr(config, "num_input_channels", 1)
    features = getattr(config, "num_time_features", 0)
    series = (past,) if width == 1 and not hasattr(config, "num_input_channels") else (past, width)
    return {
        "past_values": torch.randn(BATCH, *series, generator=draw),
        "past_observed_mask": torch.ones(BATCH, *series),
        "past_time_features": torch.randn(BATCH, past, features, generator=draw),
        "future_values": torch.randn(BATCH, future, *series[1:], generator=draw),
        "future_time_features": torch.randn(BATCH, future, features, generator=draw),
    }


def _decisions(model: Any, config: Any, draw: torch.Generator) -> Arguments:
    return {
        "states": torch.randn(BATCH, LENGTH, config.state_dim, generator=draw),
        "actions": torch.randn(BATCH, LENGTH, config.act_dim, generator=draw),
        "rewards": torch.randn(BATCH, LENGTH, 1, generator=draw),
        "returns_to_go": torch.randn(BATCH, LENGTH, 1, generator=draw),
        "timesteps": torch.arange(LENGTH).expand(BATCH, LENGTH),
        "attention_mask": torch.ones(BATCH, LENGTH),
    }
