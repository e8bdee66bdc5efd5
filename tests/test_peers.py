"""What users of neighbouring tools suffer, each case by its number; the seventh is in test_distributed."""

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp

pytestmark = pytest.mark.sampled(2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embed(ids))))


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_peers_1_tied_embedding_and_head_have_one_gradient(num_microbatches: int) -> None:
    torch.manual_seed(0)
    model = Tied().double()
    ids = torch.randint(0, 11, (8, 5))
    parted = gp.partition(model, 3, strategy={"embed": 0, "middle": 1, "head": 2}, num_microbatches=num_microbatches)
    assert parted.head.weight is parted.embed.weight
    parted(ids).square().mean().backward()
    found = parted.embed.weight.grad.clone()
    model.zero_grad()
    model(ids).square().mean().backward()
    assert torch.allclose(found, model.embed.weight.grad, rtol=1e-12)
    assert [name for name, _ in parted.named_parameters()] == [name for name, _ in model.named_parameters()]


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        shared = torch.relu(self.a(x))
        second = self.b(shared)
        third = self.c(second) + shared
        return self.d(third) * shared + second


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_peers_2_value_used_by_two_later_stages(num_microbatches: int) -> None:
    placement = {"a": 0, "b": 1, "c": 2, "d": 3}
    parted = gp.partition(Skips().double(), 4, strategy=placement, num_microbatches=num_microbatches)
    assert parted.verify(torch.randn(7, 6, dtype=torch.float64)).worst[1] < 1e-12


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, x: Tensor, flag: bool = False, mask: Tensor | None = None, scale: Tensor | None = None, times: float = 1.0
    ) -> Tensor:
        h = self.a(x)
        if flag:
            h = torch.relu(h)
        if mask is not None:
            h = h.masked_fill(mask, 0.0)
        if scale is not None:
            h = h * scale
        return self.b(h) * times


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_peers_3_flags_none_and_broadcast_keywords(num_microbatches: int) -> None:
    parted = gp.partition(Arguments().double(), 2, strategy={"a": 0, "*": 1}, num_microbatches=num_microbatches)
    x = torch.randn(8, 8, dtype=torch.float64)
    scale = torch.rand(1, 8, dtype=torch.float64)
    for keywords in (
        {},
        {"flag": True},
        {"mask": None, "flag": True},
        {"mask": torch.rand(8, 8) > 0.5},
        {"scale": scale},
        {"scale": scale, "flag": True, "times": 3.0, "mask": torch.rand(1, 8) > 0.5},
    ):
        assert parted.verify(x, **keywords).worst[1] < 1e-12


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, object]:
        h = self.a(x)
        return {
            "scores": self.b(h),
            "norm": h.square().mean(),
            "count": 3,
            "name": "net",
            "none": None,
            "many": (h, [x]),
        }


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_peers_4_scalars_in_a_dict_output(num_microbatches: int) -> None:
    model = Outputs().double()
    parted = gp.partition(model, 2, strategy={"a": 0, "b": 1}, num_microbatches=num_microbatches)
    x = torch.randn(8, 6, dtype=torch.float64)
    out, plain = parted(x), model(x)
    assert out.keys() == plain.keys()
    assert (out["count"], out["name"], out["none"]) == (3, "net", None)
    assert out["norm"].shape == () and torch.allclose(out["norm"], plain["norm"], rtol=1e-12)
    assert isinstance(out["many"], tuple) and out["many"][1][0] is x
    assert parted.verify(x).worst[1] < 1e-12


def test_peers_5_seven_samples_in_four_microbatches() -> None:
    parted = gp.partition(Skips().double(), 2, strategy={"a": 0, "b": 0, "*": 1}, num_microbatches=4)
    assert parted.verify(torch.randn(7, 6, dtype=torch.float64)).worst[1] < 1e-12
    assert parted.plan.program.sample_sizes == (2, 2, 2, 1)


def test_peers_6_batch_norm_counts_one_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    parted = gp.partition(model, 2, strategy={"0": 0, "*": 1}, num_microbatches=4)
    x = torch.randn(8, 6, dtype=torch.float64)
    hidden = model[0](x)
    parted(x).sum().backward()
    assert parted.module[1].num_batches_tracked == 1
    assert torch.allclose(parted.module[1].running_mean, 0.1 * hidden.mean(0), rtol=1e-12)
    assert torch.allclose(parted.module[1].running_var, 0.9 + 0.1 * hidden.var(0), rtol=1e-12)
    assert parted.verify(x).worst[1] < 1e-12
