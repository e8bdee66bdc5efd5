"""Small models for parts about correctness, and the training they are compared by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from gpu_parts.harness import Setting

Batch = dict[str, Tensor]
DEADLINE_S = 30.0
"""A message that is later than that never comes."""


class Words(nn.Module):
    """Blocks of causal attention and MLP between an embedding and a head; returns the loss of the next token."""

    def __init__(self, width: int, num_blocks: int, dropout: float, vocabulary: int = 64) -> None:
        super().__init__()
        self.dropout = dropout
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(num_blocks))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Loss of tokens ``[batch, seq]``."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Block(nn.Module):
    """Attention of four heads and an MLP, each with a norm before it and a residual."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.p = dropout
        self.norm, self.mixed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[batch, seq, width]`` to the same."""
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mixed(x))


class Pictures(nn.Module):
    """Convolutions with BatchNorm, pooling and a head; returns the loss.

    Without what magnifies rounding: biases that BatchNorm undoes, and kinks, where a gradient jumps.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU(), nn.AvgPool2d(2),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Loss of pictures ``[batch, 3, height, width]``."""
        return F.cross_entropy(self.head(self.features(x).mean((2, 3))), labels)


def words(setting: Setting, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    """A small language model and a batch, where the plain one runs."""
    torch.manual_seed(0)
    model = Words(setting.size(128, 16), 2, dropout).train()
    ids = torch.randint(0, 64, (setting.size(16, 4), setting.size(64, 8)))
    return model.to(setting.place), {"ids": ids.to(setting.place)}


def pictures(setting: Setting) -> tuple[nn.Module, Batch]:
    """A small model of pictures with BatchNorm, and a batch."""
    torch.manual_seed(0)
    model, side, batch = Pictures(setting.size(32, 4)).train(), setting.size(32, 8), setting.size(16, 4)
    x, labels = torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))
    return model.to(setting.place), {"x": x.to(setting.place), "labels": labels.to(setting.place)}


def partition(model: nn.Module, devices: Sequence[str], **choices: Any) -> Any:
    """A copy of the model on some workers; what hangs says so soon."""
    choices = {"deadline_s": DEADLINE_S, "optimizer_bytes_per_element": 8.0, **choices}
    return gp.partition(copy.deepcopy(model), list(devices), **choices)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Plain SGD."""
    return torch.optim.SGD(parameters, lr=0.1)


def plain_training(
    model: nn.Module, batch: Batch, optimizer_of: Callable[[Any], torch.optim.Optimizer] = sgd, steps: int = 2
) -> dict[str, Tensor]:
    """The state of a copy of the model after some eager steps, with the last loss."""
    model = copy.deepcopy(model)
    optimizer, loss = optimizer_of(model.parameters()), torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        optimizer.step()
    return {**model.state_dict(), "loss": loss.detach()}


def parted_training(
    parted: Any,
    batch: Batch,
    optimizer_of: Callable[[Any], torch.optim.Optimizer] = sgd,
    steps: int = 2,
    **options: Any,
) -> dict[str, Tensor]:
    """The state of a partitioned model after some fused steps, with the last loss."""
    optimizer, loss = optimizer_of(parted.parameters()), torch.zeros(())
    for _ in range(steps):
        loss = parted.train_step(optimizer=optimizer, **options, **batch).loss
    return {**parted.state_dict(), "loss": loss}


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float = 1e-6) -> float:
    """The largest difference in any tensor, on the scale of its own largest value but no finer than a floor.

    Infinite where a value is no number.
    """
    assert found.keys() == expected.keys()
    largest = 0.0
    for name, value in expected.items():
        mine, theirs = found[name].detach().cpu().double(), value.detach().cpu().double()
        if not (mine.isfinite().all() and theirs.isfinite().all()):
            return float("inf")
        largest = max(largest, float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=floor)))
    return largest


def check(what: str, found: float, tolerance: float) -> float:
    """Raise if a difference is too large."""
    assert found <= tolerance, f"{what}: differs by {found:.2e} from the plain model, more than {tolerance:.0e}"
    return found


def cut_by_hand() -> list[Any]:
    """Columns and rows of every MLP in shares of 3 : 1: unlike devices would be given too unlike parts to show much."""
    shares = {0: 3, 1: 1}
    return [gp.split("blocks.*.mlp.0", "n", shares), gp.split("blocks.*.mlp.2", "k", shares)]


def refusal(run: Callable[[], object]) -> str:
    """What a refusal says.

    Raises:
        AssertionError: if nothing is refused.
    """
    try:
        run()
    except gp.GraphpartError as error:
        return f"{type(error).__name__}: {error}"[:100]
    raise AssertionError("this was to be refused")


def exact_products() -> None:
    """Float32 products in float32, or a card's differences from itself would be those of TensorFloat-32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
