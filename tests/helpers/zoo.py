"""Small versions of models that people train, each built from a fixed seed: ``MODELS[name](batch)``.

A builder gives the model and the arguments of one call. Dropout stays at each model's default, labels are padded with
-100 where the model has labels, and the batch is a free choice (7 by default, which no microbatch count divides).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
WORDS = {"vocab_size": 41, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DECODER = {**SMALL, **WORDS, "num_key_value_heads": 1, "use_cache": False}


class Sample(NamedTuple):
    """A model and one call of it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Builder = Callable[[int], Sample]
MODELS: dict[str, Builder] = {}


def entry(build: Builder) -> Builder:
    """Register a builder under its name, seeded."""

    def seeded(batch: int = 7) -> Sample:
        torch.manual_seed(0)
        return build(batch)

    MODELS[build.__name__] = seeded
    return seeded


# --- text --------------------------------------------------------------------------------------------------------


def tokens(batch: int, length: int = 6) -> Tensor:
    return torch.randint(3, 41, (batch, length))


def padded_labels(ids: Tensor) -> Tensor:
    """Labels of which each row ignores another number of tokens, the first row nearly all."""
    labels = ids.clone()
    for row in range(len(labels)):
        labels[row, 2 + row % 4 :] = IGNORED
    return labels


def padding_mask(ids: Tensor) -> Tensor:
    """1 for tokens, 0 for padding at the end of each row."""
    lengths = 3 + torch.arange(len(ids)) % 4
    return (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def from_hub(model: str, config: str, **options: Any) -> nn.Module:
    """A transformers model of random weights."""
    transformers = __import__("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**options)).train()


@entry
def gpt2(batch: int) -> Sample:
    """Decoder with its head tied to the embedding."""
    model = from_hub(
        "GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, n_positions=8, use_cache=False, **WORDS
    )
    ids = tokens(batch)
    return Sample(model, (ids,), {"attention_mask": padding_mask(ids), "labels": padded_labels(ids)})


@entry
def bert(batch: int) -> Sample:
    """Encoder, masked language modelling, token types and a padding mask."""
    model = from_hub("BertForMaskedLM", "BertConfig", max_position_embeddings=8, **SMALL, vocab_size=41)
    ids = tokens(batch)
    kwargs = {
        "attention_mask": padding_mask(ids),
        "token_type_ids": torch.ones_like(ids),
        "labels": padded_labels(ids),
    }
    return Sample(model, (ids,), kwargs)


@entry
def bert_pretraining(batch: int) -> Sample:
    """Two heads and a loss that adds a loss over tokens to one over samples."""
    model = from_hub("BertForPreTraining", "BertConfig", max_position_embeddings=8, **SMALL, vocab_size=41)
    ids = tokens(batch)
    sentence = torch.randint(2, (batch,))
    return Sample(model, (ids,), {"labels": padded_labels(ids), "next_sentence_label": sentence})


@entry
def llama(batch: int) -> Sample:
    """Decoder with rotary positions, grouped queries and a padding mask."""
    ids = tokens(batch)
    model = from_hub("LlamaForCausalLM", "LlamaConfig", **DECODER)
    return Sample(model, (ids,), {"attention_mask": padding_mask(ids), "labels": padded_labels(ids)})


@entry
def t5(batch: int) -> Sample:
    """Encoder and decoder with shared embeddings and relative positions; labels are shifted inside."""
    options = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "d_kv": 8, "decoder_start_token_id": 0}
    model = from_hub("T5ForConditionalGeneration", "T5Config", **options, use_cache=False, **WORDS)
    ids = tokens(batch)
    return Sample(model, (ids,), {"attention_mask": padding_mask(ids), "labels": padded_labels(tokens(batch, 4))})


@entry
def bart(batch: int) -> Sample:
    """Encoder and decoder with learned positions and three tied embeddings."""
    options = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "use_cache": False,
    }
    options |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    model = from_hub("BartForConditionalGeneration", "BartConfig", max_position_embeddings=8, **options, **WORDS)
    ids = tokens(batch)
    return Sample(model, (ids,), {"attention_mask": padding_mask(ids), "labels": padded_labels(tokens(batch, 5))})


@entry
def mixtral(batch: int) -> Sample:
    """Mixture of experts by grouped matrix products, with the router's auxiliary loss."""
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    model = from_hub("MixtralForCausalLM", "MixtralConfig", **DECODER, **options, router_aux_loss_coef=0.1)
    ids = tokens(batch)
    return Sample(model, (ids,), {"attention_mask": padding_mask(ids), "labels": padded_labels(ids)})


@entry
def qwen_moe(batch: int) -> Sample:
    """Mixture of experts beside a shared expert; some layers dense."""
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "output_router_logits": True}
    options |= {"shared_expert_intermediate_size": 12, "decoder_sparse_step": 2, "router_aux_loss_coef": 0.1}
    model = from_hub("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **DECODER, **options)
    ids = tokens(batch)
    return Sample(model, (ids,), {"labels": padded_labels(ids)})


@entry
def lora(batch: int) -> Sample:
    """A frozen decoder with low-rank adapters on its projections."""
    sample = llama(batch)
    sample.model.requires_grad_(False)
    for layer in sample.model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Adapter(getattr(layer.self_attn, name)))
    return sample


class Adapter(nn.Module):
    """A linear layer and a low-rank correction of it (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x))) * 0.5


@entry
def transformer(batch: int) -> Sample:
    """``nn.Transformer`` with a causal mask and a padding mask."""
    ids, mask = tokens(batch), nn.Transformer.generate_square_subsequent_mask(4)
    return Sample(Translator(), (ids, tokens(batch, 4), mask), {"padding": padding_mask(ids) == 0})


class Translator(nn.Module):
    """``nn.Transformer`` between an embedding and a head tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(41, 16)
        self.body = nn.Transformer(16, 2, 1, 2, 24, batch_first=True)
        self.head = nn.Linear(16, 41, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, source: Tensor, target: Tensor, mask: Tensor, padding: Tensor | None = None) -> Tensor:
        hidden = self.body(
            self.embed(source), self.embed(target), tgt_mask=mask, src_key_padding_mask=padding, tgt_is_causal=True
        )
        return self.head(hidden)


@entry
def encoder_stack(batch: int) -> Sample:
    """``nn.TransformerEncoder``, sequence first, whose layers have a fused path in eval mode."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, norm_first=True)
    return Sample(nn.TransformerEncoder(layer, 2), (torch.randn(6, batch, 16),), {})


class Recurrent(nn.Module):
    """Embedding, recurrent layers, a head over the last step; gives its states as well."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(41, 8)
        self.body = kind(8, 10, **options)
        self.head = nn.Linear(20 if options.get("bidirectional") else 10, 5)

    def forward(self, ids: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        hidden, states = self.body(self.embed(ids), states)
        return self.head(hidden[:, -1]), states


@entry
def lstm(batch: int) -> Sample:
    """Two bidirectional LSTM layers with dropout between them."""
    return Sample(
        Recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2), (tokens(batch),), {}
    )


@entry
def gru(batch: int) -> Sample:
    """A GRU with a given state, samples along its second dimension."""
    return Sample(Recurrent(nn.GRU, batch_first=True), (tokens(batch), torch.randn(1, batch, 10)), {})


@entry
def dlrm(batch: int) -> Sample:
    """Recommendation: bags and plain embeddings of unlike sizes, pairwise products, a click loss."""
    kwargs = {
        "sparse": [torch.randint(0, n, (batch,)) for n in (11, 7, 3)],
        "bags": torch.randint(0, 9, (batch, 4)),
        "clicks": torch.randint(0, 2, (batch,)).float(),
    }
    return Sample(Recommender(), (torch.randn(batch, 6),), kwargs)


class Recommender(nn.Module):
    """DLRM's shape (Naumov et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 8) for n in (11, 7, 3))
        self.bag = nn.EmbeddingBag(9, 8, mode="mean")
        self.bottom = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(8 + 10, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(
        self, dense: Tensor, *, sparse: list[Tensor], bags: Tensor, clicks: Tensor | None = None
    ) -> dict[str, Any]:
        bottom = self.bottom(dense)
        vectors = [bottom, self.bag(bags), *(table(ids) for table, ids in zip(self.tables, sparse, strict=True))]
        stacked = torch.stack(vectors, 1)
        products = stacked @ stacked.transpose(1, 2)
        rows, columns = torch.tril_indices(5, 5, -1)
        score = self.top(torch.cat([bottom, products[:, rows, columns]], 1)).squeeze(1)
        loss = None if clicks is None else F.binary_cross_entropy_with_logits(score, clicks)
        return {"loss": loss, "score": score}


# --- images and sound ---------------------------------------------------------------------------------------------


def images(batch: int, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size)


@entry
def vit(batch: int) -> Sample:
    """Image transformer with a class token and learned positions."""
    model = from_hub("ViTForImageClassification", "ViTConfig", image_size=16, patch_size=8, num_labels=5, **SMALL)
    return Sample(model, (images(batch),), {"labels": torch.randint(5, (batch,))})


@entry
def frozen_vit(batch: int) -> Sample:
    """Only the head is trained."""
    sample = vit(batch)
    sample.model.vit.requires_grad_(False)
    return sample


@entry
def resnet(batch: int) -> Sample:
    """Convolutions with BatchNorm and shortcuts."""
    options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5}
    model = from_hub("ResNetForImageClassification", "ResNetConfig", **options)
    return Sample(model, (images(batch, 32),), {"labels": torch.randint(5, (batch,))})


@entry
def swin(batch: int) -> Sample:
    """Windows that are cut out, shifted and merged with the samples."""
    options = {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 4,
    }
    model = from_hub("SwinForImageClassification", "SwinConfig", **options, num_labels=5, drop_path_rate=0.0)
    return Sample(model, (images(batch),), {"labels": torch.randint(5, (batch,))})


@entry
def convnext(batch: int) -> Sample:
    """Depthwise convolutions, channels last, layer scale."""
    model = from_hub(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
        num_labels=5,
    )
    return Sample(model, (images(batch, 32),), {"labels": torch.randint(5, (batch,))})


@entry
def unet(batch: int) -> Sample:
    """An encoder and a decoder joined by skips, conditioned on a time step."""
    return Sample(UNet(), (images(batch), torch.randint(0, 100, (batch,))), {})


class UNet(nn.Module):
    """Down and up again with skips, GroupNorm, and a time embedding in every block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([UNetBlock(width, width, width), UNetBlock(width, 2 * width, width)])
        self.middle = UNetBlock(2 * width, 2 * width, width)
        self.up = nn.ModuleList([UNetBlock(4 * width, width, width), UNetBlock(2 * width, width, width)])
        self.resize = nn.ModuleList([nn.ConvTranspose2d(2 * width, 2 * width, 2, 2), nn.Upsample(scale_factor=2)])
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        self.width = width

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        angles = step[:, None] * torch.exp(-torch.arange(self.width // 2, device=x.device))
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
        x = self.first(x)
        skips = []
        for block in self.down:
            x = block(x, time)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x, time)
        for block, resize in zip(self.up, self.resize, strict=True):
            x = block(torch.cat([resize(x), skips.pop()], 1), time)
        return self.last(x)


class UNetBlock(nn.Module):
    """Two convolutions around the time embedding, and a shortcut."""

    def __init__(self, num_in: int, num_out: int, num_time: int) -> None:
        super().__init__()
        self.norm, self.time = nn.GroupNorm(2, num_in), nn.Linear(num_time, num_out)
        self.first, self.second = nn.Conv2d(num_in, num_out, 3, padding=1), nn.Conv2d(num_out, num_out, 3, padding=1)
        self.shortcut = nn.Conv2d(num_in, num_out, 1) if num_in != num_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(F.silu(self.norm(x))) + self.time(time)[:, :, None, None]
        return self.second(F.silu(hidden)) + self.shortcut(x)


@entry
def clip(batch: int) -> Sample:
    """Two towers and a loss over every pair of a batch's images and texts, which no microbatch can cut."""
    transformers = __import__("transformers")
    text = {**SMALL, **WORDS, "max_position_embeddings": 8}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).train()
    ids = tokens(batch)
    ids[:, -1] = WORDS["eos_token_id"]
    return Sample(model, (), {"input_ids": ids, "pixel_values": images(batch), "return_loss": True})


@entry
def whisper(batch: int) -> Sample:
    """Sound in, text out."""
    options = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "use_cache": False,
    }
    options |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8}
    options |= {"max_source_positions": 10, "max_target_positions": 8, "decoder_start_token_id": 1}
    model = from_hub("WhisperForConditionalGeneration", "WhisperConfig", **options, **WORDS, suppress_tokens=None)
    return Sample(model, (torch.randn(batch, 8, 20),), {"labels": padded_labels(tokens(batch))})


# --- dtypes -------------------------------------------------------------------------------------------------------


@entry
def mixed_dtypes(batch: int) -> Sample:
    """A bfloat16 body between a float32 embedding and a float32 head."""
    return Sample(MixedDtypes(), (tokens(batch),), {})


class MixedDtypes(nn.Module):
    """Casts between parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(41, 16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 16)).to(torch.bfloat16)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(self.embed(ids).to(torch.bfloat16))
        return self.head(hidden.float()), hidden
