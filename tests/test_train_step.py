"""``train_step``: five fused steps give the single-device model's losses, gradients and weights."""

import copy
import gc
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import graphpart as gp
from graphpart.errors import AutogradError, GraphpartError, OutOfMemoryError, ScheduleError, TraceError
from graphpart.order import SCHEDULES
from tests.helpers.models import without_dropout

pytestmark = pytest.mark.sampled(3)

STEPS = 5
STRATEGIES = ("layer", "batch", "feature", "hybrid", "free")
CLASSES = 7


class Branches(nn.Module):
    """Two branches that meet, a skip, and a weight that is used twice."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(10, width)
        self.left = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.right = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(self.norm(self.left(x) + self.right(x) + self.left(x * 0.5)))


def batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (size,), generator=draw)
    labels[step % size] = -100
    return torch.randn(size, 10, generator=draw, dtype=torch.float64), labels


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Branches().double()
    return plain, copy.deepcopy(plain)


def assert_close(plain: nn.Module, parted: nn.Module, tolerance: float = 1e-10) -> None:
    ours = dict(parted.named_parameters())
    for name, parameter in plain.named_parameters():
        scale = parameter.detach().abs().max().clamp(min=0.1)
        assert (ours[name].detach() - parameter.detach()).abs().max() <= tolerance * scale, name


@pytest.mark.sampled(16)
@pytest.mark.parametrize("schedule", [*SCHEDULES, "auto"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
def test_five_steps_by_every_schedule_and_strategy(schedule: str, strategy: str, num_devices: int) -> None:
    plain, model = models()
    options = {"chunks": 2} if (schedule, strategy) == ("interleaved", "layer") and num_devices < 4 else None
    parted = gp.partition(
        model, num_devices, strategy=strategy, strategy_options=options, schedule=schedule, num_microbatches=4
    )
    ours = torch.optim.AdamW(parted.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(STEPS):
        x, y = batch(step)
        found = parted.train_step(
            x, target=y, loss_fn=F.cross_entropy, optimizer=ours, keep_gradients=True, return_outputs=True
        )
        theirs.zero_grad()
        outputs = plain(x)
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        assert torch.allclose(found.loss, loss.detach(), rtol=1e-11)
        assert torch.allclose(found.outputs, outputs.detach(), rtol=1e-9, atol=1e-11)
        gradients = parted.grad_dict()
        for name, parameter in plain.named_parameters():
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-9, atol=1e-11), name
        theirs.step()
        ours.zero_grad()
        assert_close(plain, parted)
    assert schedule in ("auto", parted.plan.training.schedule.name)


def test_a_batch_that_does_not_divide_and_a_model_with_its_own_loss() -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    plain = without_dropout(GPT2LMHeadModel(config)).double().train()
    parted = gp.partition(copy.deepcopy(plain), 2, strategy="layer", num_microbatches=3, schedule="1f1b")
    ours = torch.optim.SGD(parted.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        ids = torch.randint(0, 64, (7, 16), generator=torch.Generator().manual_seed(step))
        labels = ids.masked_fill(ids < 9, -100)
        found = parted.train_step(input_ids=ids, labels=labels, use_cache=False, optimizer=ours)
        theirs.zero_grad()
        loss = plain(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        theirs.step()
        assert torch.allclose(found.loss, loss.detach(), rtol=1e-6)  # which the model computes in float32
        assert_close(plain, parted)
    # Each microbatch has its own part of the loss, so the last stage goes back as soon as it has gone forward.
    words = [parted.plan.training.workload.texts[t] for t in parted.plan.training.schedule.tasks[1] if t.kind in "FB"]
    in_time = [word for word in words if word[-1].isdigit()]
    assert [word[1] for word in in_time] == ["F", "B"] * 3


def test_1f1b_holds_fewer_microbatches_than_gpipe() -> None:
    peaks = {}
    for schedule in ("gpipe", "1f1b"):
        torch.manual_seed(0)
        model = nn.Sequential(*itertools.chain(*((nn.Linear(64, 64), nn.Tanh()) for _ in range(6))))
        parted = gp.partition(model, 2, strategy="layer", num_microbatches=8, schedule=schedule)
        parted.train_step(torch.randn(256, 64), target=torch.randn(256, 64), loss_fn=F.mse_loss)
        peaks[schedule] = parted.plan.training.peak_bytes
    assert all(small < large for small, large in zip(peaks["1f1b"], peaks["gpipe"], strict=True))


def test_schedulers_groups_clipping_and_accumulation() -> None:
    plain, model = models()
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=2, schedule="1f1b")

    def optimizer(of: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        named = list(of.named_parameters())
        groups = [
            {"params": [p for n, p in named if "weight" in n], "weight_decay": 0.1},
            {"params": [p for n, p in named if "weight" not in n], "weight_decay": 0.0, "lr": 0.05},
        ]
        found = torch.optim.AdamW(groups, lr=0.02)
        return found, torch.optim.lr_scheduler.StepLR(found, 2, 0.5)

    (ours, our_rates), (theirs, their_rates) = optimizer(parted), optimizer(plain)
    for step in range(6):
        clip = 0.3 if step % 2 else None
        for part in range(3):
            x, y = batch(10 * step + part)
            loss = F.cross_entropy(plain(x), y)
            loss.backward()
            last = part == 2
            found = parted.train_step(
                x,
                target=y,
                loss_fn=F.cross_entropy,
                optimizer=ours if last else None,
                clip_grad_norm=clip if last else None,
            )
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(plain.parameters(), clip)
            assert found.grad_norm is not None
            assert torch.allclose(found.grad_norm, norm, rtol=1e-10)
        theirs.step()
        theirs.zero_grad()
        their_rates.step()
        our_rates.step()
        assert_close(plain, parted)
        assert all(p.grad is None for p in parted.parameters())


def test_grad_scaler_with_accumulation() -> None:
    plain, model = models()
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=2)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (parted, plain))
    our_scaler, their_scaler = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    for step in range(4):
        x, y = batch(step)
        their_scaler.scale(F.cross_entropy(plain(x), y)).backward()
        last = step % 2 == 1
        parted.train_step(x, target=y, loss_fn=F.cross_entropy, optimizer=ours if last else None, scaler=our_scaler)
        if last:
            their_scaler.step(theirs)
            their_scaler.update()
            theirs.zero_grad()
        assert_close(plain, parted)


class Sums(nn.Module):
    """The gradients of two parameters are one tensor of autograd's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(6, dtype=torch.float64)) for _ in range(2))
        self.linear = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (self.first + self.second)


@pytest.mark.parametrize("schedule", ["gpipe", "async"])
def test_gradients_of_parameters_outside_the_optimizer_add_up(schedule: str) -> None:
    torch.manual_seed(0)
    plain = Sums()
    parted = gp.partition(copy.deepcopy(plain), 1, schedule=schedule)
    optimizer = torch.optim.SGD(parted.linear.parameters(), lr=0.0)
    for _ in range(3):
        x = torch.randn(4, 6, dtype=torch.float64)
        F.mse_loss(plain(x), x).backward()
        parted.train_step(x, target=x, loss_fn=F.mse_loss, optimizer=optimizer)
        for name in ("first", "second"):
            assert torch.allclose(getattr(parted, name).grad, getattr(plain, name).grad, rtol=1e-12)


def test_grad_scaler_skips_steps_that_overflow() -> None:
    plain, model = models()
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=2)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (parted, plain))
    our_scaler, their_scaler = (torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2))
    for step in range(5):
        x, y = batch(step)
        if step == 2:
            x[0, 0] = float("inf")
        theirs.zero_grad()
        their_scaler.scale(F.cross_entropy(plain(x), y)).backward()
        their_scaler.unscale_(theirs)
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        their_scaler.step(theirs)
        their_scaler.update()
        parted.train_step(x, target=y, loss_fn=F.cross_entropy, optimizer=ours, scaler=our_scaler, clip_grad_norm=1.0)
        assert our_scaler.get_scale() == their_scaler.get_scale()
        assert_close(plain, parted)


def test_autocast_and_plain_calls_live_side_by_side() -> None:
    torch.manual_seed(0)
    plain = Branches()
    parted = gp.partition(copy.deepcopy(plain), 2, strategy="layer", num_microbatches=2)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (parted, plain))
    for step in range(4):
        x, y = batch(step)
        x = x.float()
        theirs.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(plain(x), y)
            if step % 2:
                found = parted.train_step(x, target=y, loss_fn=F.cross_entropy, optimizer=ours).loss
            else:
                found = F.cross_entropy(parted(x), y)
        if not step % 2:
            ours.zero_grad()
            found.backward()
            ours.step()
            ours.zero_grad()
        loss.backward()
        theirs.step()
        assert torch.allclose(found.detach().float(), loss.detach().float(), rtol=2e-2)
        assert_close(plain, parted, 2e-2)


def test_loss_functions_of_all_kinds() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64))

        def forward(self, scores: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
            return F.cross_entropy(scores, given["labels"], weight=self.weight) + scores.square().mean()

    plain, model = models()
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=2)
    x, y = batch(0)
    smoothing = 0.1
    cases = [
        (nn.CrossEntropyLoss(weight=torch.linspace(1, 2, CLASSES, dtype=torch.float64)), y),
        (Weighted(), {"labels": y}),
        (lambda scores, labels: F.cross_entropy(scores, labels, label_smoothing=smoothing), y),
        (lambda scores: scores.logsumexp(1).mean().exp(), None),
    ]
    for loss_fn, target in cases:
        expected = loss_fn(plain(x)) if target is None else loss_fn(plain(x), target)
        given = {} if target is None else {"target": target}
        plain.zero_grad()
        parted.zero_grad()
        expected.backward()
        found = parted.train_step(x, loss_fn=loss_fn, **given)
        assert torch.allclose(found.loss, expected.detach(), rtol=1e-11)
        gradients = parted.grad_dict()
        for name, parameter in plain.named_parameters():
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-9, atol=1e-11), name


def test_a_lambda_written_anew_each_step_is_traced_once() -> None:
    _, model = models()
    parted = gp.partition(model, 2, strategy="layer")
    for step in range(3):
        x, y = batch(step)
        parted.train_step(x, target=y, loss_fn=lambda scores, labels: F.cross_entropy(scores, labels))
    assert parted._traces.num_traces == 1
    for scale in (1.0, 2.0):  # what it reads from around it is a part of it
        a = parted.train_step(x, target=y, loss_fn=lambda out, labels, by=scale: by * F.cross_entropy(out, labels)).loss
        assert torch.allclose(a, scale * F.cross_entropy(parted(x), y).detach())


def test_the_timeline_has_every_task_and_fits_the_schedule() -> None:
    _, model = models()
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=4, schedule="1f1b")
    optimizer = torch.optim.AdamW(parted.parameters())
    x, y = batch(0)
    found = parted.train_step(x, target=y, loss_fn=F.cross_entropy, optimizer=optimizer)
    schedule = parted.plan.training.schedule
    for device, tasks in enumerate(schedule.tasks):
        events = [e for e in found.timeline.events if e.is_work and e.device == device]
        assert [(e.kind, e.name) for e in events] == [(t.kind, t.segment) for t in tasks]


def test_an_order_by_hand_is_run_dry_before_anything_is_launched() -> None:
    _, model = models()
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=4, schedule="1f1b")
    x, _ = batch(0)
    planned = parted.prepare(x).training
    lines = planned.schedule.tasks
    for broken in ((lines[0][::-1], lines[1]), (lines[0][:-1], lines[1]), (lines[1], lines[0])):
        with pytest.raises(ScheduleError, match=r"wait for ever|leaves out|on device"):
            replace(planned, schedule=replace(planned.schedule, tasks=broken))


def test_a_step_that_was_not_recorded_has_no_timeline() -> None:
    _, model = models()
    parted = gp.partition(model, 2, strategy="layer")
    x, y = batch(0)
    found = parted.train_step(x, target=y, loss_fn=F.cross_entropy, record=False)
    for timeline in (lambda: found.timeline, parted.timeline):
        with pytest.raises(GraphpartError, match="recorded") as caught:
            timeline()
        assert type(caught.value) is GraphpartError


def test_what_cannot_be_is_refused() -> None:
    _, model = models()
    parted = gp.partition(model, 2, strategy="layer")
    x, y = batch(0)
    optimizer = torch.optim.SGD(parted.parameters(), lr=0.1)
    with pytest.raises(TraceError, match="without a loss"):
        parted.train_step(x, optimizer=optimizer)
    with pytest.raises(TraceError, match="needs loss_fn"):
        parted.train_step(x, target=y)
    with pytest.raises(TraceError, match="one floating-point number"):
        parted.train_step(x, target=y, loss_fn=lambda scores, labels: scores)
    with pytest.raises(TraceError, match="submodule"):
        parted.train_step(x, loss_fn=nn.Linear(CLASSES, 1).double())
    with pytest.raises(AutogradError, match="no_grad"), torch.no_grad():
        parted.train_step(x, target=y, loss_fn=F.cross_entropy)
    with pytest.raises(AutogradError, match="requires a gradient"):
        parted.train_step(x.requires_grad_(), target=y, loss_fn=F.cross_entropy)
    with pytest.raises(gp.ArgumentError, match="LBFGS"):
        parted.train_step(x, target=y, loss_fn=F.cross_entropy, optimizer=torch.optim.LBFGS(parted.parameters()))
    with pytest.raises(gp.ArgumentError, match="needs optimizer"):
        parted.train_step(x, target=y, loss_fn=F.cross_entropy, clip_grad_norm=1.0)
    with pytest.raises(gp.ArgumentError, match="'1f1b'"):
        gp.partition(nn.Linear(2, 2), 2, schedule="2f2b")


def test_optimizers_that_cannot_be_stepped_apart_wait_for_all() -> None:
    class Centred(torch.optim.SGD):
        """Subtracts the mean of all gradients: no parameter can be stepped alone."""

        def step(self, closure: object = None) -> None:
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            mean = torch.cat([g.flatten() for g in gradients]).mean()
            for gradient in gradients:
                gradient -= mean
            super().step()

    plain, model = models()
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=2)
    ours, theirs = (Centred(m.parameters(), lr=0.1) for m in (parted, plain))
    hooks = []
    hooked = torch.optim.SGD(parted.parameters(), lr=0.0)
    hooked.register_step_post_hook(lambda *_: hooks.append(1))
    for step in range(3):
        x, y = batch(step)
        parted.train_step(x, target=y, loss_fn=F.cross_entropy, optimizer=ours)
        theirs.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        theirs.step()
        assert_close(plain, parted)
        parted.train_step(x, target=y, loss_fn=F.cross_entropy, optimizer=hooked)
    assert len(hooks) == 3


def test_microbatches_in_flight_have_to_fit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*itertools.chain(*((nn.Linear(64, 64), nn.Tanh()) for _ in range(6))))
    x = torch.randn(4096, 64)
    graph = gp.partition(model, 2, strategy="layer", num_microbatches=8, schedule="gpipe")
    graph.train_step(x, target=x, loss_fn=F.mse_loss)
    plan = graph.plan
    peaks = {
        name: replace(plan, choices=replace(plan.choices, schedule=name)).training.peak_bytes
        for name in ("gpipe", "1f1b")
    }
    limit = (peaks["gpipe"][0] + peaks["1f1b"][0]) // 2
    devices = tuple(replace(device, memory_bytes=limit) for device in plan.cluster.devices)
    tight = replace(plan, cluster=replace(plan.cluster, devices=devices))

    def by(schedule: str) -> gp.Plan:
        return replace(tight, choices=replace(tight.choices, schedule=schedule))

    with pytest.raises(OutOfMemoryError, match=r"device . .* 8 of 8 microbatches in flight; schedule='1f1b' would fit"):
        by("gpipe").training  # noqa: B018
    assert by("auto").training.schedule.name != "gpipe"


def test_steps_that_are_kept_hold_no_values() -> None:
    _, model = models()
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=2)
    optimizer = torch.optim.AdamW(parted.parameters())

    def tensors() -> int:
        gc.collect()
        return sum(type(o) is torch.Tensor for o in gc.get_objects())

    kept, counts = [], []
    for step in range(6):
        x, y = batch(step)
        kept.append(parted.train_step(x, target=y, loss_fn=F.cross_entropy, optimizer=optimizer))
        counts.append(tensors())
    assert counts[-1] - counts[2] <= 3  # of each step no more than its loss
    assert all(step.timeline.makespan_s > 0 for step in kept)
