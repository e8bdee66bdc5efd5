"""Models for tests: small fixed ones, and random multi-branch nets built from a list of blocks.

A random net is a :class:`Recipe`, a plain value that prints, compares and can be cut down to a minimal reproducer:
each block picks its operands from the values made so far by a seed of its own, so any block can be left out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LENGTH, CHANNELS, SIDE, VOCABULARY = 6, 2, 4, 4, 6, 11
IGNORED = -100
NUM_SCORES = 8  # rows of the pool that a net without tokens predicts

Maker = Callable[[random.Random], nn.Module]


@dataclass(frozen=True, slots=True)
class Kind:
    """A block: what it reads and makes (``flat [b, WIDTH]``, ``seq [b, LENGTH, WIDTH]``, ``image [b, C, S, S]``)."""

    make: Maker
    reads: tuple[str, ...]
    num_operands: int = 1
    makes: str = ""


BLOCKS: dict[str, Kind] = {}


def block(reads: str, num_operands: int = 1, makes: str = "") -> Callable[[Any], Any]:
    """Register a block class (or a function of its random generator) under its name."""

    def register(made: Any) -> Any:
        maker = (lambda rng: made(rng)) if isinstance(made, type) else made
        BLOCKS[made.__name__] = Kind(maker, tuple(reads.split()), num_operands, makes)
        return made

    return register


# --- pointwise, dense and normalising blocks ---------------------------------------------------------------------


@block("flat seq")
def dense(rng: random.Random) -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.7)


@block("flat seq image")
def activation(rng: random.Random) -> nn.Module:
    return rng.choice([nn.GELU(), nn.ReLU(), nn.Tanh(), nn.SiLU(), nn.LeakyReLU(0.1), nn.Softplus()])


@block("flat seq image")
def dropout(rng: random.Random) -> nn.Module:
    return nn.Dropout(rng.choice([0.0, 0.3, 0.5]))


@block("flat seq")
def layer_norm(rng: random.Random) -> nn.Module:
    return nn.LayerNorm(WIDTH, elementwise_affine=rng.random() < 0.8)


@block("flat")
def batch_norm(rng: random.Random) -> nn.Module:
    return nn.BatchNorm1d(WIDTH, affine=rng.random() < 0.8, momentum=rng.choice([0.1, 0.3]))


@block("flat seq")
class Mlp(nn.Module):
    """A residual branch."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(rng.choice([0.0, 0.0, 0.2]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(x))))


@block("flat seq image", 2)
class Add(nn.Module):
    """The sum of two branches, one of them scaled by a parameter."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()) if rng.random() < 0.5 else torch.randn(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.scale * y


@block("flat seq", 2)
class Concat(nn.Module):
    """Two branches side by side, and back to the width."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.back = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.back(torch.cat([x, y], -1))


@block("flat seq image")
class Gate(nn.Module):
    """Halves that gate each other; split, chunk or unbind."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.way = rng.choice(["chunk", "split", "unbind", "uneven"])

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "chunk":
            a, b = x.chunk(2, 1)
            return torch.cat([a * b.sigmoid(), b], 1)
        if self.way == "unbind":
            a, *rest = x.unbind(1)
            return torch.stack([*rest, a * 2], 1)
        first = x.shape[1] // 2 if self.way == "split" else 1
        a, b = x.split([first, x.shape[1] - first], 1)
        return torch.cat([b, a.tanh()], 1)


@block("flat seq")
class Tied(nn.Module):
    """One layer used twice."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


@block("flat seq")
class Frozen(nn.Module):
    """Parameters that want no gradient, beside one that does."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.layer.weight.requires_grad_(False)
        self.layer.bias.requires_grad_(rng.random() < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@block("flat seq image")
class Detached(nn.Module):
    """A branch through which no gradient flows: detached, or computed under ``no_grad``."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.way = rng.choice(["detach", "no_grad", "data"])
        self.weight = nn.Parameter(torch.randn(WIDTH if rng.random() < 0.5 else 1)[:1])

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "no_grad":
            with torch.no_grad():
                scale = (x * self.weight).abs().mean(1, keepdim=True)
            return x / (1 + scale)
        if self.way == "data":
            return x * (x > 0).to(x.dtype).mean(1, keepdim=True) + self.weight
        return x + (x * self.weight).detach()


@block("flat seq image")
class InPlace(nn.Module):
    """Operators that change a tensor in place."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.way = rng.choice(["add", "slice", "relu", "fill", "index"])
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        if self.way == "add":
            y.add_(self.bias).mul_(0.5)
        elif self.way == "slice":
            y[:, 1:3] = x[:, 1:3] * self.bias
        elif self.way == "relu":
            y += x
            F.relu(y, inplace=True)
        elif self.way == "index":
            y[:, 0] += self.bias
        else:
            y.masked_fill_(x < -0.5, 0.25)
        return y


# --- blocks with state --------------------------------------------------------------------------------------------


@block("flat seq image")
class Average(nn.Module):
    """A buffer updated in the forward (an exponential moving average) and read before or after."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.reads_new = rng.random() < 0.5
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64), persistent=rng.random() < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        old = self.average.clone()
        with torch.no_grad():
            self.num_calls += 1
            self.average.mul_(0.9).add_(0.1 * x.detach().mean())
        return x - (self.average if self.reads_new else old)


@block("flat seq")
class Center(nn.Module):
    """A running mean per feature, used as it stands and updated behind."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        shifted = x - self.center
        if self.training:
            with torch.no_grad():
                self.center.copy_(0.8 * self.center + 0.2 * x.reshape(-1, WIDTH).mean(0))
        return shifted


# --- blocks that mix samples --------------------------------------------------------------------------------------


@block("flat seq")
class MixSamples(nn.Module):
    """Operators that see more than one sample."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.way = rng.choice(["mean", "softmax", "similar", "roll", "cumsum", "flip", "var", "norm", "max", "shift"])
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "mean":
            return x - x.mean(0, keepdim=True)
        if self.way == "softmax":
            return x * x.softmax(0)
        if self.way == "similar":
            rows = x.reshape(x.shape[0], -1)
            weights = (self.layer(x).reshape(x.shape[0], -1) @ rows.transpose(0, 1) / 8).softmax(-1)
            return (weights @ rows).reshape(x.shape)
        if self.way == "roll":
            return x + x.roll(1, 0)
        if self.way == "cumsum":
            return self.layer(x.cumsum(0) / x.shape[0])
        if self.way == "flip":
            return self.layer(x.flip(0)) + x
        if self.way == "var":
            return x / (1 + x.var(0, keepdim=True))
        if self.way == "norm":
            return x / (1 + x.norm())
        if self.way == "max":
            return x - x.amax(0, keepdim=True)
        return torch.cat([x[1:], x[:1] * 0.5], 0)


# --- sequences ----------------------------------------------------------------------------------------------------


@block("seq")
class Attention(nn.Module):
    """Multi-head attention with one fused projection: no mask, causal, a fixed mask or the caller's."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.way = rng.choice(["plain", "causal", "fixed", "given", "written"])
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout_p = rng.choice([0.0, 0.0, 0.25])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, HEADS, -1).transpose(1, 2) for t in self.project(x).split(WIDTH, -1))
        dropout_p = self.dropout_p if self.training else 0.0
        if self.way == "written":
            scores = (q @ k.transpose(-2, -1)) / 2
            scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
            y = F.dropout(scores.softmax(-1), dropout_p) @ v
        else:
            chosen = None
            if self.way == "given" and mask is not None:
                chosen = mask[:, None, None, :]
            elif self.way == "fixed":
                chosen = torch.eye(s, dtype=x.dtype) + torch.arange(s) / s
            y = F.scaled_dot_product_attention(q, k, v, chosen, dropout_p, is_causal=self.way == "causal")
        return x + self.out(y.transpose(1, 2).reshape(b, s, WIDTH))


@block("seq")
class Merge(nn.Module):
    """The batch and the sequence as one axis, as many heads and losses have it."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if rng.random() < 0.3 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x.reshape(-1, WIDTH))).view(x.shape)


@block("seq")
class Along(nn.Module):
    """Operators along the sequence."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.way = rng.choice(["conv", "cumsum", "shift", "position", "first", "gather"])
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, LENGTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "conv":
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        if self.way == "cumsum":
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        if self.way == "shift":
            return F.pad(x, (0, 0, 1, 0))[:, :-1] + x
        if self.way == "position":
            return x + self.position
        if self.way == "gather":
            best = x.detach().sum(-1).argmax(-1)
            return x + x.gather(1, best[:, None, None].expand(-1, 1, x.shape[2]))
        return x + x[:, :1]


@block("seq", makes="flat")
class Pool(nn.Module):
    """A sequence to one vector."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.way = rng.choice(["mean", "last", "max", "masked", "einsum"])
        self.weight = nn.Parameter(torch.randn(LENGTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.way == "mean":
            return x.mean(1)
        if self.way == "last":
            return x[:, -1]
        if self.way == "max":
            return x.max(1).values
        if self.way == "masked" and mask is not None:
            weight = mask.to(x.dtype).unsqueeze(-1)
            return (x * weight).sum(1) / weight.sum(1).clamp(min=1)
        return torch.einsum("bsd,s->bd", x, self.weight)


@block("flat", makes="seq")
class Unfold(nn.Module):
    """A vector to a sequence."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, LENGTH * WIDTH) if rng.random() < 0.6 else None
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.layer is None:
            return x[:, None].expand(-1, LENGTH, -1) + self.position
        return self.layer(x).view(-1, LENGTH, WIDTH)


@block("flat")
class Router(nn.Module):
    """Experts with an auxiliary loss that multiplies two means (f · P of Switch Transformer, section 2.2)."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        chosen = F.one_hot(share.argmax(-1), 3).to(x.dtype)
        self.loss = 3 * (chosen.mean(0) * share.mean(0)).sum()
        kept = share * chosen
        return x + sum(kept[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


# --- images -------------------------------------------------------------------------------------------------------


@block("image")
def conv(rng: random.Random) -> nn.Module:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=rng.random() < 0.5, groups=rng.choice([1, 1, 2, CHANNELS]))


@block("image")
def batch_norm_2d(rng: random.Random) -> nn.Module:
    return nn.BatchNorm2d(CHANNELS)


@block("image")
def group_norm(rng: random.Random) -> nn.Module:
    return rng.choice([nn.GroupNorm(2, CHANNELS), nn.InstanceNorm2d(CHANNELS, affine=True)])


@block("image")
class ResidualConv(nn.Module):
    """The block of a ResNet."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(x + self.bn2(self.conv2(y)))


@block("image")
class Resample(nn.Module):
    """Pooling and interpolation."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.pool = rng.choice([nn.MaxPool2d(2), nn.AvgPool2d(2)])
        self.mode = rng.choice(["nearest", "bilinear"])

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.pool(x), size=x.shape[2:], mode=self.mode)


@block("image", makes="flat")
class Flatten(nn.Module):
    """An image to one vector."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.whole = rng.random() < 0.3
        self.layer = nn.Linear(CHANNELS * SIDE * SIDE if self.whole else CHANNELS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1) if self.whole else F.adaptive_avg_pool2d(x, 1).flatten(1))


# --- the random net -----------------------------------------------------------------------------------------------

LOSSES = ("cross_entropy", "weighted", "smooth", "sum", "mse", "huber", "binary", "divergence", "none")
OUTPUTS = ("loss", "tuple", "dict", "tensor")


@dataclass(frozen=True)
class Recipe:
    """Everything that a random net and its arguments depend on.

    Attributes:
        seed: of the initial values and the data.
        family: of the first input: ``flat``, ``tokens`` or ``image``.
        blocks: pairs (name of the block, its own seed).
        loss: how the net computes its loss; ``none`` for no loss inside.
        outputs: in which form it returns results.
        tied: whether the head shares the embedding's weight.
        dtype: ``float64`` or ``float32``.
        batch: number of samples.
        training: train or eval mode.
        input_grad: whether float inputs want a gradient.
        with_mask: whether the caller gives a mask.
    """

    seed: int
    family: str
    blocks: tuple[tuple[str, int], ...]
    loss: str = "cross_entropy"
    outputs: str = "dict"
    tied: bool = True
    dtype: str = "float64"
    batch: int = 7
    training: bool = True
    input_grad: bool = False
    with_mask: bool = False


@dataclass
class Example:
    """A model with arguments to call it with."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def random_recipe(rng: random.Random, dtype: str | None = None) -> Recipe:
    """A random recipe of 2 to 9 blocks."""
    family = rng.choice(["flat", "tokens", "image"])
    kinds = {"flat": {"flat"}, "tokens": {"seq"}, "image": {"image"}}[family]
    blocks = []
    for _ in range(rng.randint(2, 9)):
        name = rng.choice([n for n, kind in BLOCKS.items() if kinds & set(kind.reads)])
        blocks.append((name, rng.randrange(1 << 16)))
        if BLOCKS[name].makes:
            kinds = kinds | {BLOCKS[name].makes}
    return Recipe(
        seed=rng.randrange(1 << 16),
        family=family,
        blocks=tuple(blocks),
        loss=rng.choice(LOSSES),
        outputs=rng.choice(OUTPUTS),
        tied=rng.random() < 0.6,
        dtype=dtype or ("float64" if rng.random() < 0.8 else "float32"),
        batch=rng.randint(5, 9),
        training=rng.random() < 0.85,
        input_grad=rng.random() < 0.4,
        with_mask=rng.random() < 0.5,
    )


class RandomNet(nn.Module):
    """The net of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.blocks = nn.ModuleList(BLOCKS[name].make(random.Random(seed)) for name, seed in recipe.blocks)
        num_scores = VOCABULARY if recipe.family == "tokens" else NUM_SCORES
        self.head = nn.Linear(WIDTH, num_scores, bias=False)
        if recipe.family == "tokens":
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            if recipe.tied:
                self.head.weight = self.embed.weight
        self.register_buffer("class_weight", torch.rand(num_scores) + 0.5)
        self.unused = nn.Parameter(torch.randn(3))
        self.wiring = self._wire()

    def _wire(self) -> list[tuple[str, tuple[int, ...]] | None]:
        """Per block, the kind and the places of the values it reads: mostly the newest, so that nets are deep as well
        as wide. None where there is nothing to read.
        """
        sizes = Counter({"seq" if self.recipe.family == "tokens" else self.recipe.family: 1})
        found: list[tuple[str, tuple[int, ...]] | None] = []
        for name, seed in self.recipe.blocks:
            kind, rng = BLOCKS[name], random.Random(seed + 1)
            readable = [k for k in kind.reads if sizes[k]]
            if not readable:
                found.append(None)
                continue
            chosen = rng.choice(readable)
            places = range(sizes[chosen])
            picked = (places[-1] if rng.random() < 0.6 else rng.choice(places) for _ in range(kind.num_operands))
            found.append((chosen, tuple(picked)))
            sizes[kind.makes or chosen] += 1
        return found

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        *,
        shift: Tensor | None = None,
        flag: bool = True,
    ) -> Any:
        pool: dict[str, list[Tensor]] = {"flat": [], "seq": [], "image": []}
        if self.recipe.family == "tokens":
            pool["seq"].append(self.embed(x))
        else:
            pool[self.recipe.family].append(x)
        if shift is not None:
            for kind in ("flat", "seq"):
                pool[kind] = [value + shift for value in pool[kind]]
        for (name, _), inner, wires in zip(self.recipe.blocks, self.blocks, self.wiring, strict=True):
            if wires is not None:
                chosen, places = wires
                extra = {"mask": mask} if isinstance(inner, Attention | Pool) else {}
                made = inner(*(pool[chosen][place] for place in places), **extra)
                pool[BLOCKS[name].makes or chosen].append(made)
        feature = self._feature(pool)
        scores = self.head(feature) if flag else feature
        return self._results(x, labels, scores, feature)

    def _feature(self, pool: Mapping[str, list[Tensor]]) -> Tensor:
        """One vector a sample, or one a token for a language model; every kind takes part."""
        image = [value.mean((2, 3)).repeat(1, 2)[:, :WIDTH] for value in pool["image"][-2:]]
        if self.recipe.family == "tokens":
            flat = [value.unsqueeze(1) for value in pool["flat"][-1:]]
            return sum([*pool["seq"][-2:], *flat])  # type: ignore[return-value]
        return sum([*pool["flat"][-2:], *(v.mean(1) for v in pool["seq"][-1:]), *image])  # type: ignore[return-value]

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor | None:
        way, classes = self.recipe.loss, scores.shape[-1]
        rows, targets = scores.reshape(-1, classes), labels.reshape(-1)
        if way == "none":
            return None
        if way in ("cross_entropy", "weighted", "smooth", "sum"):
            weight = self.class_weight if way == "weighted" else None
            smoothing = 0.1 if way == "smooth" else 0.0
            reduction = "sum" if way == "sum" else "mean"
            return F.cross_entropy(rows, targets, weight=weight, label_smoothing=smoothing, reduction=reduction)
        wanted = F.one_hot(targets.clamp(min=0), classes).to(scores.dtype)
        if way == "mse":
            return F.mse_loss(rows, wanted)
        if way == "huber":
            return F.smooth_l1_loss(rows, wanted)
        if way == "binary":
            return F.binary_cross_entropy_with_logits(rows, wanted, pos_weight=self.class_weight)
        return F.kl_div(rows.log_softmax(-1), (wanted + 0.1) / (1 + 0.1 * classes), reduction="batchmean")

    def _results(self, x: Tensor, labels: Tensor, scores: Tensor, feature: Tensor) -> Any:
        loss = self._loss(scores, labels)
        for inner in self.blocks:
            if isinstance(inner, Router) and inner.loss is not None:
                loss = inner.loss if loss is None else loss + 0.1 * inner.loss
                inner.loss = None
        way = self.recipe.outputs
        if way == "loss" and loss is not None:
            return loss
        if way == "tuple":
            return (loss, scores) if loss is not None else (scores, feature)
        if way == "dict":
            return {"loss": loss, "logits": scores, "given": x, "count": 3, "hidden": {"last": feature, "none": None}}
        return scores


def make_example(recipe: Recipe) -> Example:
    """The net of a recipe, with arguments."""
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    model = RandomNet(recipe)
    dtype = getattr(torch, recipe.dtype)
    model.to(dtype).train(recipe.training)
    b = recipe.batch
    if recipe.family == "tokens":
        x = torch.randint(VOCABULARY, (b, LENGTH))
        labels = torch.randint(VOCABULARY, (b, LENGTH))
    else:
        shape = (b, WIDTH) if recipe.family == "flat" else (b, CHANNELS, SIDE, SIDE)
        x = torch.randn(shape, dtype=dtype).requires_grad_(recipe.input_grad)
        labels = torch.randint(NUM_SCORES, (b,))
    labels[torch.rand(labels.shape) < 0.3] = IGNORED
    labels.view(-1)[-1] = 1
    kwargs: dict[str, Any] = {"flag": True}
    mask = None
    if recipe.with_mask and recipe.family == "tokens":
        mask = torch.rand(b, LENGTH) < 0.7
        mask[:, 0] = True
    if recipe.with_mask:
        kwargs["shift"] = torch.randn(1, WIDTH, dtype=dtype).requires_grad_(recipe.input_grad)
    if mask is None:
        return Example(model, (x, labels), {"mask": None, **kwargs})
    return Example(model, (x,), {"labels": labels, "mask": mask, **kwargs})


def without_dropout(model: nn.Module) -> nn.Module:
    """The model itself, every dropout set to pass everything."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, Attention):
            module.dropout_p = 0.0
    return model


# --- fixed models -------------------------------------------------------------------------------------------------


class Chain(nn.Sequential):
    """``num_layers`` linear layers in a row."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(*(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)))


class Skips(nn.Module):
    """A value used by three later parts, with BatchNorm between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU()) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, NUM_SCORES)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        shared = torch.tanh(self.first(x))
        y = shared
        for part in self.parts:
            y = part(y) + shared
        scores = self.head(y)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


class TiedWords(nn.Module):
    """An embedding whose weight is the head's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


class TwoOutputs(nn.Module):
    """Two heads, each with parameters that the other's gradient never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(self.body(x))
        return self.a(y), self.b(y)


def gpt2_example(batch: int, dtype: torch.dtype = torch.float32) -> Example:
    """A tiny GPT-2 with its head tied to the embedding, and labels padded with -100."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).to(dtype).train()
    ids = torch.randint(31, (batch, 10))
    labels = ids.clone()
    for row in range(batch):
        labels[row, 10 - row % 7 :] = IGNORED
    return Example(model, (), {"input_ids": ids, "labels": labels})


def resnet_example(batch: int, dtype: torch.dtype = torch.float32) -> Example:
    """A tiny ResNet image classifier in training mode."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    torch.manual_seed(0)
    model = ResNetForImageClassification(config).to(dtype).train()
    return Example(
        model, (), {"pixel_values": torch.randn(batch, 3, 32, 32, dtype=dtype), "labels": torch.randint(5, (batch,))}
    )


def skips_example(batch: int, dtype: torch.dtype = torch.float32) -> Example:
    """:class:`Skips` with data."""
    torch.manual_seed(0)
    model = Skips().to(dtype)
    labels = torch.randint(NUM_SCORES, (batch,))
    labels[1] = IGNORED
    return Example(model, (torch.randn(batch, WIDTH, dtype=dtype), labels))
