"""Partitioned models against plain ones: random examples by the oracle, and fixed ones that must always be there."""

from __future__ import annotations

import copy
import functools
import gc
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import AutogradError, ExecutionError, ScheduleError
from graphpart.ir.program import Backward, Program
from graphpart.ir.schedule import Schedule
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of, lower
from graphpart.order import dry_run, gpipe
from graphpart.trace import Traced, trace
from tests.helpers.fused import FUSED, ordered_by
from tests.helpers.models import (
    NUM_SCORES,
    WIDTH,
    Chain,
    Example,
    Skips,
    TiedWords,
    TwoOutputs,
    gpt2_example,
    resnet_example,
    skips_example,
)
from tests.oracle import (
    Outcome,
    check_safely,
    compare,
    expected_traffic,
    make_optimizer,
    random_cases,
    random_placement,
    random_schedule,
    sleeping_workers,
    traced_as,
    train_step,
    varied_seeds,
)

pytestmark = pytest.mark.sampled(2)

NUM_MODELS, NUM_PLACEMENTS = 24, 5


@pytest.mark.sampled(32)
@pytest.mark.parametrize("number", range(NUM_MODELS))
def test_random_model_on_random_placements_by_random_schedules(number: int, first_seed: int) -> None:
    cases = random_cases(varied_seeds(first_seed, NUM_MODELS, NUM_PLACEMENTS)[number], NUM_PLACEMENTS)
    wrong = {str(case): found for case in cases if (found := check_safely(case))}
    assert not wrong, "\n".join(f"{case}\n  " + "\n  ".join(found) for case, found in wrong.items())


@pytest.mark.sampled(8)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", FUSED)
def test_five_fused_steps_leave_the_plain_models_weights_and_statistics(schedule: str, optimizer: str) -> None:
    """Gradients are freed by each update; the model's own loss, which is returned besides, gets no gradient."""
    example = skips_example(7, torch.float64)
    plain, model = example.model, copy.deepcopy(example.model)
    strategy = random_placement("scattered", 3)
    with ordered_by(schedule, seed=5) as name:
        parted = gp.partition(model, 3, strategy=strategy, num_microbatches=3, schedule=name)
        ours, theirs = make_optimizer(optimizer, parted), make_optimizer(optimizer, plain)
        for step in range(5):
            target = torch.randn(7, NUM_SCORES, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            with sleeping_workers(step):
                found = parted.train_step(
                    *example.args, target=target, loss_fn=distance, optimizer=ours, return_outputs=True
                )
            result = plain(*example.args)
            loss = distance(result, target)
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-10, atol=0.0)
            torch.testing.assert_close(found.outputs["loss"], result["loss"].detach(), rtol=1e-10, atol=0.0)
            assert all(parameter.grad is None for parameter in parted.parameters())
    for (name, value), (_, expected) in zip(parted.state_dict().items(), plain.state_dict().items(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12, msg=name)


def distance(result: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.mse_loss(result["logits"], target)


# --- GPT-2, ResNet, and a value used by three later parts ---------------------------------------------------------

EXAMPLES: dict[str, Callable[[int, torch.dtype], Example]] = {
    "gpt2": gpt2_example,
    "resnet": resnet_example,
    "skips": skips_example,
}


@functools.cache
def prepared(name: str, batch: int, dtype: torch.dtype) -> tuple[Example, Traced, Outcome]:
    """A fixed example, its trace, and a step of the plain model."""
    example = EXAMPLES[name](batch, dtype)
    plain = copy.deepcopy(example.model)
    traced = trace(example.model, example.args, example.kwargs)
    outcome, _ = train_step(plain, example, loss_of, make_optimizer("adamw", plain))
    return example, traced, outcome


def loss_of(result: Any) -> Tensor:
    return result["loss"]


def parted_step(
    example: Example, traced: Traced, num_devices: int, num_microbatches: int, strategy: Any = "layer"
) -> tuple[gp.PartitionedModule, Outcome]:
    """A step of the partitioned model; its optimizer is built before the first call."""
    parted = gp.partition(
        copy.deepcopy(example.model), num_devices, strategy=strategy, num_microbatches=num_microbatches
    )
    optimizer = make_optimizer("adamw", parted)
    with traced_as(traced), sleeping_workers(num_microbatches):
        outcome, _ = train_step(parted, example, loss_of, optimizer)
    return parted, outcome


def whole_gradient_error(ours: Outcome, plain: Outcome) -> float:
    """Norm of the difference of all gradients over the norm of all gradients."""
    ours_flat = torch.cat([g.flatten().double() for g in ours.gradients.values() if g is not None])
    plain_flat = torch.cat([g.flatten().double() for g in plain.gradients.values() if g is not None])
    return float((ours_flat - plain_flat).norm() / plain_flat.norm())


def check_statistics(example: Example, ours: Outcome) -> None:
    """BatchNorm has counted one batch, not one a microbatch."""
    for name, before in example.model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert ours.buffers[name] == before + 1


@pytest.mark.sampled(16)
@pytest.mark.parametrize(
    ("name", "num_devices", "num_microbatches", "batch"),
    [
        pytest.param(name, devices, parts, 7 + (devices + parts) % 2, marks=pytest.mark.xdist_group(f"oracle {name}"))
        for name in EXAMPLES
        for devices in (1, 2, 3)
        for parts in (1, 3, 4)
    ],
)
def test_G1_split_model_equals_plain_one_in_float32(
    name: str, num_devices: int, num_microbatches: int, batch: int
) -> None:
    """Outputs to 1e-5 of their largest element, the whole gradient to 1e-5 of its norm.

    Single tensors are not held to 1e-5 of themselves in float32: the scale of a BatchNorm that a convolution and
    another BatchNorm follow has a gradient of zero in exact arithmetic, and what is left of it is rounding, in the
    plain model as here. In float64, where that rounding is below 1e-13, every tensor is compared by itself.
    """
    example, traced, plain = prepared(name, batch, torch.float32)
    parted, ours = parted_step(example, traced, num_devices, num_microbatches)
    assert compare(ours, plain) == []
    assert whole_gradient_error(ours, plain) <= 1e-5
    check_statistics(example, ours)
    program = parted.plan.program
    assert len({s.device for s in program.segments}) == num_devices
    (loss,) = (
        w for w, x in zip(program.outputs, parted.plan.graph.outputs, strict=True) if program.wire[w].shape == ()
    )
    expected = expected_traffic(program, backward_of(program, [loss]))
    assert (parted.last_step.num_messages, parted.last_step.message_bytes) == expected


@pytest.mark.sampled(16)
@pytest.mark.parametrize("num_microbatches", [1, 3, 4])
@pytest.mark.parametrize("strategy", ["layer", "scattered"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(f"oracle {n}")) for n in EXAMPLES])
def test_G1_split_model_equals_plain_one_in_float64(name: str, strategy: str, num_microbatches: int) -> None:
    example, traced, plain = prepared(name, 7, torch.float64)
    _, ours = parted_step(example, traced, 3, num_microbatches, random_placement(strategy, seed=5))
    assert compare(ours, plain) == []
    assert whole_gradient_error(ours, plain) <= 1e-10
    check_statistics(example, ours)


# --- counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_layers", "num_messages"), [(2, 2), (4, 6)])
def test_survey_layer_split_of_a_chain_sends_two_messages_a_boundary(num_layers: int, num_messages: int) -> None:
    """The survey's formula for a layer split: a chain of L workers sends (L-1)·2 messages."""
    parted = gp.partition(Chain(num_layers), num_layers, strategy={str(i): i for i in range(num_layers)})
    parted(torch.randn(8, WIDTH)).sum().backward()
    assert parted.last_step.num_messages == num_messages == (num_layers - 1) * 2
    assert parted.last_step.message_bytes == num_messages * 8 * WIDTH * 4


def test_messages_of_a_chain_rise_with_microbatches() -> None:
    parted = gp.partition(Chain(4), 4, strategy={str(i): i for i in range(4)}, num_microbatches=3)
    parted(torch.randn(7, WIDTH)).sum().backward()
    assert parted.last_step.num_messages == 3 * 2 * 3


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_T1_tied_weight_crosses_once_a_step_and_its_gradient_once_back(num_microbatches: int) -> None:
    torch.manual_seed(0)
    model = TiedWords().double()
    plain = copy.deepcopy(model)
    strategy = {"embed": 0, "body": 0, "head": 1}
    parted = gp.partition(model, 2, strategy=strategy, num_microbatches=num_microbatches)
    ids = torch.randint(WIDTH, (8, 5))
    parted(ids).square().mean().backward()
    plain(ids).square().mean().backward()
    torch.testing.assert_close(parted.embed.weight.grad, plain.embed.weight.grad, rtol=1e-10, atol=1e-14)
    program = parted.plan.program
    backward = backward_of(program, program.outputs)
    for bridges in (program.bridges, backward.bridges):
        crossing = [program.wire[b.wire].value for b in bridges]
        assert crossing.count("embed.weight") == 1
    # The activation crosses once a microbatch and direction, besides.
    assert parted.last_step.num_messages == 2 * (1 + num_microbatches)


def test_T1_value_with_three_readers_on_one_device_crosses_once() -> None:
    parted = gp.partition(Skips(), 2, strategy={"first": 0, "tanh": 0, "*": 1})
    example = skips_example(8)
    parted(*example.args)["loss"].backward()
    program = parted.plan.program
    assert sum(program.wire[b.wire].value == "tanh" for b in program.bridges) == 1


# --- schedules ----------------------------------------------------------------------------------------------------


@functools.cache
def lowered(seed: int) -> tuple[Program, Backward]:
    example, traced, _ = prepared("skips", 7, torch.float64)
    del example
    placement = random_placement("scattered", seed)(traced.graph, gp.make_cluster(3))  # type: ignore[operator]
    program = lower(traced.graph, placement, 3, num_microbatches=3)
    return program, backward_of(program, [name for name in program.outputs if name is not None])


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32))
def test_dry_run_accepts_any_order_that_respects_dependencies(seed: int) -> None:
    program, backward = lowered(seed % 8)
    workload = Workload(program, backward)
    dry_run(workload, random_schedule(workload, random.Random(seed)))


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32), data=st.data())
def test_dry_run_names_the_task_that_a_broken_schedule_has_wrong(seed: int, data: st.DataObject) -> None:
    program, backward = lowered(seed % 8)
    workload = Workload(program, backward)
    schedule = random_schedule(workload, random.Random(seed))
    lines = [list(line) for line in schedule.tasks]
    device = data.draw(st.sampled_from([d for d, line in enumerate(lines) if line]))
    position = data.draw(st.integers(0, len(lines[device]) - 1))
    task = lines[device][position]
    fault = data.draw(st.sampled_from(["missing", "twice", "elsewhere"]))
    if fault != "twice":
        del lines[device][position]
    if fault == "twice":
        lines[device].insert(data.draw(st.integers(0, len(lines[device]))), task)
    elif fault == "elsewhere":
        lines[(device + 1) % 3].append(task)
    broken = replace(schedule, tasks=tuple(map(tuple, lines)))
    words = {"missing": "leaves out", "twice": "twice", "elsewhere": f"on device {(device + 1) % 3}"}[fault]
    with pytest.raises(ScheduleError, match=words) as error:
        dry_run(workload, broken)
    assert str(task) in str(error.value)


def test_dry_run_finds_devices_that_wait_for_each_other() -> None:
    graph = trace(Chain(4), (torch.randn(4, WIDTH),)).graph
    placement = gp.Placement.whole(graph, {op.name: i % 2 for i, op in enumerate(graph.operators)})
    program = lower(graph, placement, 2)
    workload = Workload(program)
    schedule = gpipe(workload)
    first, second = schedule.forward
    broken = Schedule("swapped", (first[::-1], second))
    with pytest.raises(ScheduleError, match="would wait for ever") as error:
        dry_run(workload, broken)
    text = str(error.value)
    assert "'swapped'" in text
    assert f"device 0 waits with {first[1]} for {second[0]}" in text
    assert f"device 1 waits with {second[0]} for {first[0]}" in text


def test_backward_order_is_checked_too() -> None:
    program, backward = lowered(0)
    workload = Workload(program, backward)
    schedule = gpipe(workload)
    lines = zip(schedule.forward, schedule.backward, strict=True)
    broken = replace(schedule, tasks=tuple(forward + backward[::-1] for forward, backward in lines))
    with pytest.raises(ScheduleError, match="B:"):
        dry_run(workload, broken)


# --- one partitioned object, used as a module is ------------------------------------------------------------------


class Pair:
    """A plain model and the same model on two devices, with data of any size."""

    def __init__(self, num_microbatches: int = 2) -> None:
        torch.manual_seed(0)
        self.plain = nn.Sequential(
            nn.Linear(WIDTH, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.Tanh(),
            nn.Linear(WIDTH, WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, 3),
        ).double()
        self.parted = gp.partition(
            copy.deepcopy(self.plain), 2, strategy={"[012]": 0, "[345]": 1}, num_microbatches=num_microbatches
        )

    def batch(self, size: int) -> Tensor:
        return torch.randn(size, WIDTH, dtype=torch.float64)

    def check(self) -> None:
        """Gradients and buffers agree."""
        for (name, ours), (_, plain) in zip(self.parted.named_parameters(), self.plain.named_parameters(), strict=True):
            assert (ours.grad is None) == (plain.grad is None), name
            if plain.grad is not None:
                torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-13, msg=name)
        for (name, ours), (_, plain) in zip(self.parted.named_buffers(), self.plain.named_buffers(), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-13, msg=name)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_other_batch_sizes_on_the_same_object(pair: Pair) -> None:
    for size in (7, 4, 9, 7):
        x = pair.batch(size)
        for model in (pair.plain, pair.parted):
            model.zero_grad()
            model(x).square().sum().backward()
        pair.check()


def test_train_eval_train(pair: Pair) -> None:
    x = pair.batch(6)
    for mode in (True, False, True):
        for model in (pair.plain, pair.parted):
            model.train(mode)
            model.zero_grad()
        a, b = pair.parted(x), pair.plain(x)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        a.sum().backward()
        b.sum().backward()
        pair.check()
    assert pair.parted.get_buffer("1.num_batches_tracked") == 2


def test_several_forwards_before_one_backward(pair: Pair) -> None:
    first, second, third = pair.batch(5), pair.batch(5), pair.batch(8)
    for model in (pair.plain, pair.parted):
        (model(first).sum() + model(second).square().sum() * model(third).mean()).backward()
    pair.check()


def test_gradients_accumulate_over_calls(pair: Pair) -> None:
    first, second = pair.batch(5), pair.batch(5)
    for model in (pair.plain, pair.parted):
        model(first).square().mean().backward()
        model(second).square().mean().backward()
    pair.check()


def test_abandoned_forwards_leave_only_their_statistics(pair: Pair) -> None:
    x = pair.batch(5)
    for model in (pair.plain, pair.parted):
        for _ in range(3):
            model(x)
        model(x).square().sum().backward()
    pair.check()


def test_no_grad(pair: Pair) -> None:
    x = pair.batch(5)
    with torch.no_grad():
        out = pair.parted(x)
        plain = pair.plain(x)
    assert not out.requires_grad
    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-13)
    assert pair.parted.last_step.num_messages == 2  # one a microbatch, and none back
    for model in (pair.plain, pair.parted):
        model(x).sum().backward()
    pair.check()


def test_autograd_grad_leaves_grad_alone(pair: Pair) -> None:
    x = pair.batch(5)
    ours = torch.autograd.grad(pair.parted(x).square().sum(), list(pair.parted.parameters()))
    plain = torch.autograd.grad(pair.plain(x).square().sum(), list(pair.plain.parameters()))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert all(p.grad is None for p in pair.parted.parameters())


def test_gradient_of_an_input_read_on_two_devices() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    torch.manual_seed(0)
    plain = Reads().double()
    parted = gp.partition(copy.deepcopy(plain), 2, strategy={"a": 0, "b": 1}, num_microbatches=3)
    x = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(parted(x).sum(), x)
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)


def test_two_outputs_and_a_gradient_for_one() -> None:
    torch.manual_seed(0)
    plain = TwoOutputs().double()
    parted = gp.partition(copy.deepcopy(plain), 3, strategy={"body": 0, "a": 1, "b": 2})
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for model in (plain, parted):
        model(x)[0].sum().backward()
    assert parted.b.weight.grad is None and parted.b.bias.grad is None
    for name in ("body", "a"):
        torch.testing.assert_close(getattr(parted, name).weight.grad, getattr(plain, name).weight.grad)
    assert parted.last_step.num_messages == 3  # two forward, and one gradient back
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(parted(x)[1].sum(), [parted.a.weight])


def test_autocast_equals_the_plain_model_under_autocast() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    parted = gp.partition(copy.deepcopy(plain), 2, strategy={"[01]": 0, "[23]": 1}, num_microbatches=2)
    x = torch.randn(6, WIDTH)
    results = []
    for model in (plain, parted):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        out.float().square().sum().backward()
        results.append(out)
    assert results[1].dtype == results[0].dtype == torch.bfloat16
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)
    for ours, expected in zip(parted.parameters(), plain.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, expected.grad, rtol=5e-2, atol=5e-2 * float(expected.grad.abs().max()))
    assert parted(x).dtype == torch.float32  # and without autocast it runs as before


# --- what autograd cannot do here ---------------------------------------------------------------------------------


def test_second_backward_is_refused(pair: Pair) -> None:
    loss = pair.parted(pair.batch(5)).sum()
    loss.backward()
    with pytest.raises(AutogradError, match="already run"):
        loss.backward()


def test_two_losses_of_one_call_are_refused_the_second_time() -> None:
    parted = gp.partition(TwoOutputs(), 2, strategy={"body": 0, "*": 1})
    a, b = parted(torch.randn(4, WIDTH))
    a.sum().backward()
    with pytest.raises(AutogradError, match="already run"):
        b.sum().backward()


@pytest.mark.parametrize(("option", "words"), [("retain_graph", "retain_graph"), ("create_graph", "create_graph")])
def test_graphs_that_stay_are_refused(pair: Pair, option: str, words: str) -> None:
    x = pair.batch(5)
    wanted = list(pair.parted.parameters())
    with pytest.raises(AutogradError, match=words):
        torch.autograd.grad(pair.parted(x).sum(), wanted, **{option: True})
    pair.plain(x)  # the refused call has updated the statistics, as any forward does
    for model in (pair.plain, pair.parted):  # and the module is as good as before
        model(x).sum().backward()
    pair.check()


# --- failures and leaks -------------------------------------------------------------------------------------------


def test_error_in_a_worker_names_operator_device_and_line_and_the_module_stays_usable() -> None:
    torch.manual_seed(0)
    parted = gp.partition(TiedWords(), 2, strategy={"embed": 1, "body": 0, "head": 0}, num_microbatches=2)
    good = torch.randint(WIDTH, (4, 3))
    before = parted(good).detach().clone()
    bad = good.clone()
    bad[3, 0] = 1000
    with pytest.raises(ExecutionError) as error:
        parted(bad)
    text = str(error.value)
    for words in ("embedding", "aten.embedding.default", "device 1", "microbatch 1", "models.py:", "IndexError"):
        assert words in text
    assert isinstance(error.value.__cause__, IndexError)
    assert torch.equal(parted(good), before)
    parted(good).sum().backward()
    assert parted.body.weight.grad is not None


@pytest.mark.slow
def test_three_hundred_steps_leak_neither_threads_nor_tensors() -> None:
    torch.manual_seed(0)
    parted = gp.partition(Chain(2), 2, strategy={"0": 0, "1": 1}, num_microbatches=2)
    optimizer = torch.optim.SGD(parted.parameters(), lr=0.01)
    x = torch.randn(4, WIDTH)

    def steps(number: int) -> tuple[int, int]:
        for i in range(number):
            optimizer.zero_grad()
            out = parted(x)
            if i % 3:  # every third forward is abandoned
                out.square().mean().backward()
                optimizer.step()
            del out
        gc.collect()
        return threading.active_count(), sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    threads_before, tensors_before = steps(5)
    threads, tensors = steps(300)
    assert threads <= threads_before  # workers of an earlier test may have ended meanwhile
    assert tensors <= tensors_before  # what an earlier test held may be freed meanwhile
