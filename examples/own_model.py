"""A model of one's own: two towers, and a skip that three parts use; placed by hand, checked, drawn.

Pictures go through convolutions on one worker while words go through an embedding and linear layers on the other. What
the stem makes (``skip``) is used at the gate, behind the mixer and before the head; it crosses once all the same::

    python examples/own_model.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import DrawError, PlacementError

PATTERNS = {
    "stem*": 0,
    "pictures*": 0,
    "words*": 1,
    "gate*": 0,
    "mixer*": 1,
    "head*": 1,
    "cat": 1,
}
"""Device index by module path or operator name; what no pattern matches follows its first operand."""


class TwoTowers(nn.Module):
    """Classifies a picture with its caption.

    Args:
        num_words: size of the vocabulary.
        width: of every hidden layer.
        num_classes: of the answer.
    """

    def __init__(self, num_words: int = 100, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.pictures = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.words = nn.Sequential(
            nn.Embedding(num_words, width), nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()
        )
        self.gate = nn.Linear(width, width)
        self.mixer = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, picture: Tensor, caption: Tensor, hint: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The loss and the scores.

        Args:
            picture: ``[batch, 3, height, width]``.
            caption: word indices, ``[batch, words]``.
            hint: ``[batch, width]``.
            label: class indices, ``[batch]``; -100 is not counted.
        """
        skip = torch.tanh(self.stem(hint))
        seen = self.pictures(picture) * torch.sigmoid(self.gate(skip))
        read = self.words(caption).mean(dim=1)
        mixed = self.mixer(torch.cat([seen, read], dim=-1)) + skip
        scores = self.head(F.relu(mixed) + skip)
        return {"loss": F.cross_entropy(scores, label), "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for plan.own_model.svg (default: here)")
    out = parser.parse_args().out

    torch.manual_seed(0)
    batch = {
        "picture": torch.randn(12, 3, 32, 32),
        "caption": torch.randint(100, (12, 7)),
        "hint": torch.randn(12, 64),
        "label": torch.tensor([1, 2, -100, 4, 5, -100, -100, 8, 9, 0, 1, 2]),
    }
    parted = gp.partition(TwoTowers(), 2, strategy=PATTERNS, num_microbatches=3)

    report = parted.verify(**batch)
    print(parted.plan.explain())
    print(f"\nChecked against the plain model: {report}")
    crossing = [bridge for bridge in parted.plan.program.bridges if bridge.wire.startswith("tanh")]
    print(f"The skip has three readers and crosses {len(crossing)} times: once a microbatch")
    try:
        print(f"The picture is in {parted.plan.draw(out / 'plan.own_model.svg')}")
    except DrawError as error:
        print(f"No picture: {error}")

    optimizer = torch.optim.AdamW(parted.parameters(), lr=1e-2)
    for step in range(1, 21):
        optimizer.zero_grad()
        loss = parted(**batch)["loss"]
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step:2d}  loss {loss.item():.4f}")

    # A slip of the pen is refused before anything runs.
    try:
        gp.partition(TwoTowers(), 2, strategy={"picture*": 0, "wrods*": 1})(**batch)
    except PlacementError as error:
        print(f"\nRefused, as it should be: {error}")


if __name__ == "__main__":
    main()
