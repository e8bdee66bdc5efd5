"""Calls that are no single graph: how much of them is planned, what is said of the rest, how they train."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphpart as gp
from graphpart.cost.devices.clusters import make_cluster
from graphpart.errors import OutOfMemoryError
from graphpart.module.fused_update import Update
from tests.helpers.processes import process_group, run_processes

WIDTH = 8


class Cube(torch.autograd.Function):
    """Has a backward of its own, and no derivative that a trace could find."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 5 * gradient * x**2


class Net(nn.Module):
    """Three layers around something."""

    def __init__(self, around: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.around = around
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.around(self, self.a(x)))))


def custom(net: Net, x: Tensor) -> Tensor:
    return Cube.apply(x)


def deciding(net: Net, x: Tensor) -> Tensor:
    return x if x.mean() > 0 else -x


def counting(net: Net, x: Tensor) -> Tensor:
    net.seen.append(len(x))
    net.mean = 0.5 * net.mean + 0.5 * x.detach().mean(0)
    return x - net.mean


AROUND = {"an island": custom, "a break": deciding, "side effects": counting}


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, WIDTH, generator=generator), torch.randn(6, WIDTH, generator=generator)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_training_equals_one_device(around: str, num_microbatches: int) -> None:
    model = Net(AROUND[around])
    plain = copy.deepcopy(model)
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=num_microbatches)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.05) for m in (parted, plain))
    for step in range(4):
        x, y = batch(step)
        found = parted.train_step(x, target=y, loss_fn=F.mse_loss, optimizer=ours, return_outputs=True)
        outputs = plain(x)
        expected = F.mse_loss(outputs, y)
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        torch.testing.assert_close(found.loss, expected.detach())
        torch.testing.assert_close(found.outputs, outputs.detach())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(parted.state_dict()[name], tensor, msg=name)
    assert model.seen == plain.seen


@pytest.mark.skipif(torch.__version__ < "2.12", reason="earlier TorchDynamos may cut such a graph in two")
@pytest.mark.parametrize(("around", "is_fused"), [(counting, True), (deciding, False)])
def test_one_graph_with_side_effects_is_a_fused_step(
    around: Callable[[Net, Tensor], Tensor], is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind: list[Tensor] = []
    monkeypatch.setattr(Update, "follow", lambda self, loss: behind.append(loss))
    parted = gp.partition(Net(around), 2, strategy="layer", num_microbatches=2)
    step = parted.train_step(batch()[0], target=batch()[1], loss_fn=F.mse_loss)
    assert len(behind) == (not is_fused)
    if is_fused:
        assert [event.kind for event in step.timeline.events].count("B") >= 4


def test_a_call_in_one_graph_is_all_planned() -> None:
    parted = gp.partition(Net(lambda net, x: x), 2, strategy="layer")
    with pytest.raises(gp.GraphpartError, match="before the first call"):
        parted.explain()
    parted(batch()[0])
    assert parted.coverage.share == 1.0 and not parted.coverage.notes
    assert "one graph" in str(parted.coverage) and "one graph" in parted.explain()
    assert parted.plan is parted.last_step.plan


def test_what_is_not_planned_is_said_with_its_lines() -> None:
    parted = gp.partition(Net(lambda net, x: custom(net, deciding(net, x))), 2, strategy="layer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nearly all is planned
        parted(batch()[0])
    coverage = parted.coverage
    assert len(coverage.plans) > 2 and len(coverage.islands) == 1 and not coverage.unread
    (broken,) = coverage.breaks
    assert "test_pieces.py" in broken and "x if x.mean() > 0 else -x" in broken
    assert "autograd_function_apply" in coverage.islands[0].operators and "test_pieces.py" in coverage.islands[0].why
    assert "\n" not in coverage.islands[0].why
    text = parted.explain()
    assert text.count("Net: ") == len(coverage.plans) and text.endswith(str(coverage))
    assert parted.plan.notes[-len(coverage.notes) :] == coverage.notes


def test_a_model_that_is_hardly_planned_is_warned_of() -> None:
    """Half of the FLOPs are in an island, as a weight is changed in place where autograd does not see it."""

    def hidden(net: Net, x: Tensor) -> Tensor:
        y = x @ x.t() @ x
        y.data.mul_(0.5)
        return y

    parted = gp.partition(Net(hidden), 2, strategy="layer")
    with pytest.warns(UserWarning, match=r"% of the FLOPs of a forward are planned .*on one device as it is") as caught:
        parted(batch()[0])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parted(batch()[0])
    assert parted.coverage.share < 0.9


def test_what_runs_where_no_graph_is_is_warned_of() -> None:
    """TorchDynamo leaves a function alone; its FLOPs are not counted, its parameters are read by no graph."""

    @torch.compiler.disable
    def alone(net: Net, x: Tensor) -> Tensor:
        return net.b(x)

    parted = gp.partition(Net(alone), 2, strategy="layer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is read elsewhere, too
        parted(batch()[0])
    parted = gp.partition(Net(lambda net, x: x), 2, strategy="layer")
    parted.module.b.forward = torch.compiler.disable(parted.module.b.forward)
    with pytest.warns(UserWarning, match=r"no graph reads b\.weight, b\.bias"):
        parted(batch()[0])


def test_parameters_keep_their_homes_over_graphs_and_traces() -> None:
    parted = gp.partition(Net(deciding), 2, strategy="feature")
    homes: dict[str, object] = {}
    for step in range(4):
        parted(batch(step)[0][: 6 - step]).sum().backward()
        for name, home in parted._state.homes.items():
            assert homes.setdefault(name, home) == home
    assert homes.keys() >= {name for name, _ in parted.named_parameters()}


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", ["layer", pytest.param("feature", marks=pytest.mark.slow)])
@pytest.mark.parametrize("around", [lambda net, x: x, deciding, custom], ids=["one graph", "several", "island"])
def test_a_dispatch_mode_around_a_call_changes_nothing(around: Callable[[Net, Tensor], Tensor], strategy: str) -> None:
    """TorchDynamo follows nothing under one, and its guards do not hold."""
    net, x = Net(around), torch.randn(4, WIDTH)
    wanted = net(x)
    parted = gp.partition(net, 2, strategy=strategy)
    with Passing():
        first = parted(x)
    plans = parted.coverage.plans
    with Passing():
        again = parted(x)
    assert torch.allclose(first, wanted) and torch.allclose(again, wanted)
    assert plans and parted.coverage.plans == plans


def test_warnings_of_the_model_are_heard() -> None:
    def warning(net: Net, x: Tensor) -> Tensor:
        warnings.warn("the model says so", stacklevel=1)
        net.seen.append(1)
        return x

    parted = gp.partition(Net(warning), 2, strategy="layer")
    for _ in range(2):
        with pytest.warns(UserWarning, match="the model says so"):
            parted(batch()[0])


def test_a_graph_that_cannot_be_split_so_says_it_runs_whole() -> None:
    def without_weights(net: Net, x: Tensor) -> Tensor:
        return deciding(net, 2 * custom(net, x).relu())

    parted = gp.partition(Net(without_weights), 2, strategy="feature")
    parted(batch()[0])
    assert any("runs on one device" in note for plan in parted.coverage.plans for note in plan.notes)
    assert "runs on one device" in parted.explain()


def test_a_graph_that_does_not_fit_is_refused() -> None:
    cluster = make_cluster(2)
    small = replace(cluster, devices=tuple(replace(device, memory_bytes=500) for device in cluster.devices))
    with pytest.raises(OutOfMemoryError, match="cpu:"):
        gp.partition(Net(deciding), small, strategy="layer")(batch()[0])


def test_grad_modes_of_a_graph_and_of_its_caller() -> None:
    """The result of a region that has gradients, in a caller that has none, keeps them."""

    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(x)
            with torch.enable_grad():
                y = self.b(Cube.apply(self.a(h)))
            return y

    model = Region()
    plain, parted = copy.deepcopy(model), gp.partition(model, 2, strategy="layer")
    x = torch.randn(3, 4)
    with torch.no_grad():
        found, expected = parted(x), plain(x)
        assert not torch.is_grad_enabled()  # the region is over
    assert found.requires_grad and expected.requires_grad
    found.sum().backward()
    expected.sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parted.get_parameter(name).grad, parameter.grad)


def stepping(net: Net, x: Tensor) -> Tensor:
    """A counter that forward reads, in Python only."""
    net.count = getattr(net, "count", 0) + 1
    return x * 2 if net.count % 2 else x * 3


def test_a_counter_that_forward_reads_costs_no_new_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    parted = gp.partition(Net(stepping), 2, strategy="layer")
    plain = Net(stepping)
    for _ in range(3):
        assert torch.allclose(parted(batch()[0]), plain(batch()[0]))
    monkeypatch.setattr("graphpart.module.pieces.trace", None)
    for _ in range(5):
        assert torch.allclose(parted(batch()[0]), plain(batch()[0]))
    (pieces,) = parted._traces._pieces.values()
    assert len(pieces.made) == 2


def test_graphs_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def growing(net: Net, x: Tensor) -> Tensor:
        net.count = getattr(net, "count", 0) + 1
        return x * net.count

    monkeypatch.setattr("graphpart.module.pieces.MAX_GRAPHS", 3)
    parted, plain = gp.partition(Net(growing), 2, strategy="layer"), Net(growing)
    for _ in range(8):
        assert torch.allclose(parted(batch()[0]), plain(batch()[0]))
        (pieces,) = parted._traces._pieces.values()
        assert len(pieces.made) <= 3 and len(pieces._cut_codes) <= 4


def test_graphs_of_a_call_share_the_memory() -> None:
    """Each fits for itself; all of them, which wait for backward, do not."""

    def breaking(net: Net, x: Tensor) -> Tensor:
        if x.sum() > -1e9:
            x = net.a(x).tanh()
        if x.sum() > -1e9:
            x = net.a(x).sin()
        return x

    parted = gp.partition(Net(breaking), 2, strategy="single")
    parted(batch()[0])
    coverage = parted.coverage
    alone = [plan.all_in_flight.peak_bytes for plan in coverage.plans]
    together = coverage.memory.peak_bytes
    assert max(alone) < together < sum(alone) and coverage.forecast_s > 0
    assert "together: " in str(coverage)
    cluster, limit = make_cluster(1), (max(alone) + together) // 2
    small = replace(cluster, devices=tuple(replace(device, memory_bytes=limit) for device in cluster.devices))
    with pytest.raises(OutOfMemoryError, match="wait for backward, too"):
        gp.partition(Net(breaking), small, strategy="single")(batch()[0])


def _train_in_processes(rank: int, world: int, folder: str) -> None:
    with process_group(rank, world, folder):
        torch.set_num_threads(1)
        for name, around in {**AROUND, "a weight in an island": weighing}.items():
            for fused in (False, True):
                _train_beside(name, around, world, fused)
        for around, wanted in REFUSED:
            parted = gp.partition(Net(around), world, strategy="layer", deadline_s=20)
            with pytest.raises(gp.GraphpartError, match=wanted):
                parted(batch()[0])


def _train_beside(name: str, around: Callable[[Net, Tensor], Tensor], world: int, fused: bool) -> None:
    model = Net(around)
    plain = copy.deepcopy(model)
    parted = gp.partition(model, world, strategy="layer", deadline_s=20)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.05) for m in (parted, plain))
    for step in range(3):
        x, y = batch(step)
        for own, optimizer in ((parted, ours), (plain, theirs)):
            if fused and own is parted:
                parted.train_step(x, target=y, loss_fn=F.mse_loss, optimizer=ours)
            else:
                optimizer.zero_grad()
                F.mse_loss(own(x), y).backward()
                optimizer.step()
    found = parted.state_dict()
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(found[key], tensor, msg=f"{name}: {key}")
    assert model.seen == plain.seen


def weighing(net: Net, x: Tensor) -> Tensor:
    return Cube.apply(x @ net.b.weight) + Cube.apply(net.b.weight).sum()


def drawing(net: Net, x: Tensor) -> Tensor:
    return x * torch.nn.functional.dropout(x[x > -9], 0.5).mean() + Noise.apply(x)


class Noise(Cube):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x + torch.rand_like(x)


@torch.compiler.disable
def reading(net: Net, x: Tensor) -> Tensor:
    return x * float(net.b.weight.sum())


@torch.compiler.disable
def replacing(net: Net, x: Tensor) -> Tensor:
    net.b.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
    return x


REFUSED = (
    (drawing, "draws random numbers"),
    (reading, "reads values of a parameter"),
    (replacing, r"forward changes the parameter 'b\.weight'"),
)


@pytest.mark.slow
@pytest.mark.processes
def test_calls_in_pieces_train_in_processes() -> None:
    run_processes(_train_in_processes, 2, timeout_s=300)


def test_a_first_call_may_be_unlike_the_next() -> None:
    """It finds a flag, which it sets; later calls, which are alike, are one graph."""

    def starting(net: Net, x: Tensor) -> Tensor:
        if not getattr(net, "ready", False):
            net.ready = True
            return 3 * x
        return x

    def noting(net: Net, x: Tensor) -> Tensor:
        net.ready = getattr(net, "ready", True)
        return x

    for around, is_whole in ((starting, False), (noting, True)):
        parted, plain = gp.partition(Net(around), 2, strategy="layer"), Net(around)
        for step in range(3):
            torch.testing.assert_close(parted(batch()[0]), plain(batch()[0]))
            assert parted.module.ready and bool(parted.coverage.breaks) == (not step and not is_whole)


class Asks(nn.Module):
    """Fails where it is compiled, and there alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.scale = torch.ones(len(x), 1)
        return self.layer(x) * self.scale


def test_what_fails_only_where_it_is_compiled_runs_as_on_one_device() -> None:
    torch.manual_seed(0)
    model, x = Asks(), torch.randn(4, WIDTH)
    want = copy.deepcopy(model)(x)
    parted = gp.partition(model, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(parted(x), want)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # as the model says it
            parted(torch.randn(4, WIDTH + 1))


def clamping(net: Net, x: Tensor) -> Tensor:
    net.b.weight.data.clamp_(-0.1, 0.1)
    return x


def test_a_parameter_written_behind_autograds_back_is_all_of_the_island() -> None:
    model = Net(clamping)
    plain, parted = copy.deepcopy(model), gp.partition(model, 2, strategy="layer")
    x = batch()[0]
    for net in (plain, parted):
        net(x).sum().backward()
    assert parted.coverage.share == 1.0 and len(parted.coverage.islands) == 1
    with torch.no_grad():  # where no hook can be hung on a parameter
        torch.testing.assert_close(gp.partition(copy.deepcopy(plain), 2)(x), plain(x))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parted.get_parameter(name), parameter)
        torch.testing.assert_close(parted.get_parameter(name).grad, parameter.grad)


class WithoutSamples(nn.Module):
    """Two graphs, of which the second has no tensor with samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        total = self.a(x).sum()
        torch._dynamo.graph_break()
        return self.b.weight.mv(self.b.bias) * total


def test_a_graph_without_samples_is_not_cut_into_microbatches() -> None:
    torch.manual_seed(0)
    model, x = WithoutSamples(), torch.randn(4, WIDTH)
    parted = gp.partition(copy.deepcopy(model), 2, strategy="layer", num_microbatches=2)
    torch.testing.assert_close(parted(x), model(x))


class InPlace(nn.Module):
    """Its second graph begins with a change of a tensor that has a gradient, which shows when all of it is traced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.rest = nn.Linear(WIDTH, WIDTH), nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1.0
        torch._dynamo.graph_break()
        h.mul_(2.0)
        return self.rest(h) + h


def test_what_is_wrong_with_a_graph_is_looked_for_by_halves() -> None:
    model = InPlace()
    plain, parted = copy.deepcopy(model), gp.partition(model, 2, strategy="layer")
    x = batch()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the share that is not planned
        want, found = plain(x), parted(x)
    torch.testing.assert_close(found, want)
    assert parted.coverage.share > 0.6, str(parted.coverage)
    want.sum().backward()
    found.sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parted.get_parameter(name).grad, parameter.grad)


class Counts(nn.Module):
    """Python between its graphs goes by numbers that a graph gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        h = self.a(x)
        times = sizes.tolist()
        torch._dynamo.graph_break()
        return self.b(h) * min(times[0] / times[1], 1.0)


def test_a_number_that_a_graph_gives_is_this_calls() -> None:
    model, x = Counts(), torch.randn(4, WIDTH)
    parted = gp.partition(copy.deepcopy(model), 2, strategy="layer")
    for sizes in (torch.tensor([1, 2]), torch.tensor([3, 4])):
        torch.testing.assert_close(parted(x, sizes), model(x, sizes))


def test_what_is_written_by_a_view_is_not_cut_from_it() -> None:
    """An island lies between a view and what writes it: neither values nor gradients are lost."""

    def writing(net: Net, x: Tensor) -> Tensor:
        y = x * 2.0
        view = y[:, :3]
        cubes = Cube.apply(x)
        view.mul_(cubes[:, :3])
        kept = x * 3.0
        cubes = Cube.apply(cubes * 0.1)
        kept.add_(cubes)
        return y + kept

    parted, plain = gp.partition(Net(writing), 2, strategy="layer"), Net(writing)
    found, wanted = parted(batch()[0]), plain(batch()[0])
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parted.grad_dict()[name], parameter.grad, msg=name)


def test_a_number_in_the_result_is_said_to_depend_on_data() -> None:
    class Counting(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
            y = self.b(self.a(x))
            return y, int((y > 0).sum())

    parted, plain = (wrap(Counting(custom)) for wrap in (lambda m: gp.partition(m, 2, strategy="layer"), nn.Sequential))
    x = batch()[0]
    found, wanted = parted(x), plain(x)
    assert torch.allclose(found[0], wanted[0]) and found[1] == wanted[1]
    assert parted.coverage.breaks == ("it gives a number that depends on data",)


class Branches(nn.Module):
    """One of two layers, by a ``torch.cond``."""

    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: self.yes(y).relu(), lambda y: self.no(y).tanh(), (x,))


def test_of_a_cond_the_branch_that_is_meant_gives_the_result() -> None:
    model = Branches()
    parted = gp.partition(copy.deepcopy(model), 1)
    x = torch.randn(4, 8).abs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sign in (-1, 1, -1):  # the first call counts what runs
            torch.testing.assert_close(parted(sign * x), model(sign * x))
    assert parted.coverage.share < 0.1


class Slopes(nn.Module):
    """The slopes of a network where it is; TorchDynamo's graph of it opens levels of ``torch.func``."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.func.vmap(torch.func.jacrev(lambda row: torch.tanh(self.net(row)).sum()))(x))


def test_what_fails_to_be_traced_leaves_no_mode_behind() -> None:
    model, x = Slopes(), torch.randn(4, 8)
    parted = gp.partition(copy.deepcopy(model), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = parted(x)
    found.sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(found, model(x))
    gradients = parted.grad_dict()
    assert all(torch.allclose(gradients[name], p.grad) for name, p in model.named_parameters())


def test_a_model_that_is_called_in_pieces_is_freed() -> None:
    def broken(_: Net, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    net = Net(broken)
    parted, kept = gp.partition(net, 2, strategy="layer"), weakref.ref(net)
    parted(batch()[0])
    assert parted.coverage.breaks
    del net, parted
    gc.collect()
    assert kept() is None
