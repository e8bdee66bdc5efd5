"""The models of the gallery, small enough to be drawn whole."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


class MLP(nn.Sequential):
    """Linear layers ``fc1``, ``fc2``, … with ReLUs between.

    Args:
        widths: of the input and of each layer.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(pairwise(widths), 1):
            if i > 1:
                self.add_module(f"relu{i - 1}", nn.ReLU())
            self.add_module(f"fc{i}", nn.Linear(inputs, outputs))


class LocallyConnected(nn.Sequential):
    """Layers ``local1``, ``local2``, … whose neurons each see three neighbours in the layer before."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        for i in range(1, num_layers + 1):
            self.add_module(f"local{i}", nn.Conv1d(1, 1, kernel_size=3, padding=1))


class SparseMLP(MLP):
    """Layers of one width whose masks leave blocks of neurons with edges to each other, and few between blocks.

    The neurons of a block lie scattered over each layer.

    Args:
        num_layers: of linear layers.
        width: neurons a layer.
        num_blocks: a divisor of the width.
        between: edges between blocks from layer to layer.
    """

    def __init__(self, num_layers: int, width: int, num_blocks: int, between: int) -> None:
        super().__init__(*[width] * (num_layers + 1))
        block_of = [
            [(5 * i + 7 * layer) % width * num_blocks // width for i in range(width)] for layer in range(num_layers + 1)
        ]
        for layer in range(num_layers):
            mask = torch.tensor([[float(a == b) for a in block_of[layer]] for b in block_of[layer + 1]])
            for extra in range(between):
                mask[(3 * extra + 4 * layer) % width, (7 * extra + 2 * layer) % width] = 1.0
            prune.custom_from_mask(self.get_submodule(f"fc{layer + 1}"), "weight", mask)


class StackedLSTM(nn.Module):
    """A language model: embedding, layers of LSTM cells unrolled over time, decoder."""

    def __init__(self, num_layers: int = 2, width: int = 32, num_words: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_words, width)
        self.lstm = nn.ModuleList(nn.LSTMCell(width, width) for _ in range(num_layers))
        self.decoder = nn.Linear(width, num_words)

    def forward(self, words: Tensor) -> Tensor:
        """Scores of the next word: ``[batch, time, num_words]`` for words ``[batch, time]``."""
        zero = torch.zeros(words.shape[0], self.decoder.in_features)
        state = [(zero, zero) for _ in self.lstm]
        scores = []
        for word in words.unbind(1):
            x = self.embedding(word)
            for i, cell in enumerate(self.lstm):
                state[i] = cell(x, state[i])
                x = state[i][0]
            scores.append(self.decoder(x))
        return torch.stack(scores, 1)


class Fork(nn.Module):
    """One product that two operators read, as in TensorFlow's example."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Tanh()
        self.c = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 8]`` to ``[batch, 8]``."""
        a = self.a(x)
        return self.b(a) + self.c(a)


class Convolutions(nn.Module):
    """Convolutions that hold little and work much, before a classifier that holds much and works little."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.Linear(32 * 16 * 16, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, 3, 32, 32]`` to ``[batch, 10]``."""
        return self.classifier(self.features(images).flatten(1))
