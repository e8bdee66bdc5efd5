"""Sounds and sequences of different lengths: wav2vec2 with CTC, and a packed LSTM."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from twenty_parts.training import Maker, Training, adamw, sgd

BATCH = 4


def wav2vec2() -> Training:
    """wav2vec2 with CTC, sounds of different lengths, and SpecAugment, which draws masks with NumPy."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(16,) * 4,
        conv_stride=(5, 2, 2, 2), conv_kernel=(10, 3, 3, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
        mask_time_prob=0.1, mask_time_length=4, ctc_loss_reduction="mean", vocab_size=20,
    )  # fmt: skip
    batches = []
    for i in range(4):
        draw = torch.Generator().manual_seed(i)
        lengths = torch.tensor([1600, 1400 - 40 * i, 1600, 1200])
        mask = (torch.arange(1600) < lengths[:, None]).long()
        labels = torch.randint(1, 20, (BATCH, 6), generator=draw)
        labels[1, 4:] = -100
        sound = torch.randn(BATCH, 1600, generator=draw) * mask
        batches.append({"input_values": sound, "attention_mask": mask, "labels": labels})
    return Training(Wav2Vec2ForCTC(config), batches, None, adamw)


class PackedLstm(nn.Module):
    """Two layers, both ways, over packed sequences; classes of whole sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.lstm = nn.LSTM(24, 24, 2, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 5))

    def forward(self, ids: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        packed = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=ids.shape[1])
        pooled = out.sum(1) / lengths[:, None]
        return nn.functional.cross_entropy(self.head(pooled), labels)


def packed_lstm() -> Training:
    """An LSTM that does not read padding."""
    batches = []
    for i in range(4):
        draw = torch.Generator().manual_seed(i)
        ids, labels = torch.randint(50, (BATCH, 9), generator=draw), torch.randint(5, (BATCH,), generator=draw)
        batches.append({"ids": ids, "lengths": torch.tensor([9, 3 + i, 6, 2]).roll(i), "labels": labels})
    return Training(PackedLstm(), batches, lambda loss: loss, sgd)


MAKERS: Mapping[str, Maker] = {"wav2vec2 with CTC": wav2vec2, "packed LSTM": packed_lstm}
