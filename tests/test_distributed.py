"""Processes on Gloo give the same bits as threads."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphpart as gp
from tests.helpers.processes import process_group, run_processes

pytestmark = [pytest.mark.slow, pytest.mark.processes]

STEPS = 20


class Net(nn.Module):
    """Dropout, BatchNorm, a tied head, a value used by three later parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.first = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)
        self.left = nn.Linear(12, 12)
        self.right = nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(12, 12).requires_grad_(False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        shared = torch.relu(self.first(self.embed(ids).mean(1)))
        shared = nn.functional.dropout(self.norm(shared), 0.2, self.training)
        left = nn.functional.dropout(torch.tanh(self.left(shared)), 0.5, self.training)
        right = self.frozen(torch.sigmoid(self.right(shared)))
        scores = self.head(left + right + shared)
        return {"loss": nn.functional.cross_entropy(scores, labels, ignore_index=-100), "scores": scores}


PLACEMENT = {
    1: {"*": 0},
    2: {"left": 1, "head": 1, "norm": 1, "*": 0},
    3: {"left": 1, "norm": 2, "right": 2, "head": 1, "*": 0},
}


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(0, 11, (7, 5), generator=generator)
        labels = torch.randint(0, 11, (7,), generator=generator)
        labels[:2] = -100
        found.append((ids, labels))
    return found


def train(world: int, num_microbatches: int) -> dict[str, torch.Tensor]:
    """Train; returns every loss, the parameters, the gradients and the buffers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parted = gp.partition(Net(), world, strategy=PLACEMENT[world], num_microbatches=num_microbatches)
    optimizer = torch.optim.AdamW(parted.parameters(), lr=1e-2)
    torch.manual_seed(1)
    losses, messages = [], 0
    for ids, labels in batches():
        optimizer.zero_grad()
        out = parted(ids, labels)
        out["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parted.parameters(), 0.5)
        optimizer.step()
        losses += [out["loss"].detach(), norm, out["scores"].detach().sum()]
        messages += parted.last_step.num_messages
    found = {"losses": torch.stack(losses), "messages": torch.tensor(messages)}
    found.update({f"p.{k}": v.clone() for k, v in parted.state_dict().items()})
    found.update({f"g.{k}": v.clone() for k, v in parted.grad_dict().items() if v is not None})
    return found


def _process(rank: int, world: int, num_microbatches: int, folder: str) -> None:
    with process_group(rank, world, folder):
        torch.save(train(world, num_microbatches), f"{folder}/rank{rank}.pt")


def _fail_on_one_rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    torch.set_num_threads(1)
    parted = gp.partition(Net(), world, strategy={"left": 1, "norm": 2, "embed": 1, "*": 0}, num_microbatches=2)
    ids, labels = batches()[0]
    ids[6, 2] = 99  # there are 11 words
    try:
        parted(ids, labels)
    except gp.GraphpartError as error:
        Path(f"{folder}/rank{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


def test_peers_7_every_rank_names_the_fault() -> None:
    """PEERS 7: the other ranks say more than "Connection closed by peer"."""
    folder = run_processes(_fail_on_one_rank, 3)
    for rank in range(3):
        text = (folder / f"rank{rank}.txt").read_text()
        assert text.startswith("ExecutionError"), text
        assert "aten.embedding.default in embed at" in text and "test_distributed.py" in text, text
        assert "failed on device 1 (cpu, microbatch 1)" in text and "index out of range" in text, text
        assert rank == 1 or "rank 1 failed" in text


def _misuse(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    torch.set_num_threads(1)
    found = []
    for devices in (1, 3):
        try:
            gp.partition(Net(), devices)
        except gp.GraphpartError as error:
            found.append(f"{type(error).__name__}: {error}")
    torch.manual_seed(0)
    parted = gp.partition(Net(), world, strategy=PLACEMENT[world])
    ids, labels = batches()[0]
    for other in (ids[:5], ids.flip(0)):
        try:
            parted(other if rank else ids, labels[: len(other)] if rank else labels)
        except gp.GraphpartError as error:
            found.append(f"{type(error).__name__}: {error}")
    found.append(str(torch.isfinite(parted(ids, labels)["loss"]).item()))  # no harm was done
    Path(f"{folder}/rank{rank}.txt").write_text("\n".join(found))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_that_disagree_are_told_so_before_anything_is_mixed() -> None:
    folder = run_processes(_misuse, 2)
    for rank in range(2):
        lines = (folder / f"rank{rank}.txt").read_text().splitlines()
        assert [line.split(":")[0] for line in lines[:4]] == ["ClusterError"] * 2 + ["RanksDifferError"] * 2, lines
        assert "1 devices need as many processes, but torch.distributed runs 2" in lines[0]
        assert all("ranks differ in the arguments: rank 1 has args[0] " in line for line in lines[2:4]), lines
        assert lines[4] == "True"


@pytest.mark.parametrize(("world", "num_microbatches"), [(2, 1), (2, 3), (3, 4)])
def test_processes_give_the_bits_of_threads(world: int, num_microbatches: int) -> None:
    """20 training steps, dropout on: losses, parameters, gradients, buffers, and message counts."""
    threads_before = torch.get_num_threads()
    expected = train(world, num_microbatches)
    torch.set_num_threads(threads_before)
    folder = run_processes(_process, world, num_microbatches)
    results = [torch.load(folder / f"rank{r}.pt") for r in range(world)]
    assert sum(int(r["messages"]) for r in results) == int(expected["messages"])
    for found in results:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name != "messages":
                assert torch.equal(found[name], value), name


class Recurrent(nn.Module):
    """Recurrent layers hold weak references to their weights, which tiles have to get past."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(4, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])


def train_recurrent(kind: str, strategy: str) -> list[float]:
    torch.manual_seed(0)
    parted = gp.partition(Recurrent(kind), 2, strategy=strategy, deadline_s=60)
    optimizer = torch.optim.SGD(parted.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = parted(torch.randn(6, 3, 4)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _recurrent(rank: int, world: int, folder: str) -> None:
    with process_group(rank, world, folder):
        torch.set_num_threads(1)
        found = [train_recurrent(kind, strategy) for kind in ("LSTM", "GRU") for strategy in ("layer", "batch")]
        torch.save(found, f"{folder}/rank{rank}.pt")


def test_recurrent_layers_run_in_processes() -> None:
    folder = run_processes(_recurrent, 2)
    expected = [train_recurrent(kind, strategy) for kind in ("LSTM", "GRU") for strategy in ("layer", "batch")]
    for rank in range(2):
        assert torch.load(folder / f"rank{rank}.pt") == expected
