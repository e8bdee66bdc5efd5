"""Backward in two parts: gradients of inputs, and of weights, are together what the whole backward gives."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp
from graphpart.ir.graph import Ref
from graphpart.ir.program import Step
from graphpart.rules.weights import WEIGHTS, carried, deferrable, deferred_weights
from graphpart.runtime.kernels.deferred import Late, deferring_kernel, late_gradients
from graphpart.runtime.kernels.table import kernel_of
from tests.helpers.splitting import split_backward, weights_at_random
from tests.test_models import check

# --- one operator ---------------------------------------------------------------------------------------------------

Case = tuple[str, list[Any]]
"""A target and its arguments, tensors among them."""


def draw(rng: random.Random, *shape: int) -> Tensor:
    found = torch.randn(shape, dtype=torch.float64)
    if len(shape) > 1 and rng.random() < 0.3:  # not contiguous
        found = found.mT.contiguous().mT
    return found


def linear(rng: random.Random) -> Case:
    sizes, n, k = [rng.randint(1, 3) for _ in range(rng.randint(0, 3))], rng.randint(1, 5), rng.randint(1, 5)
    bias = rng.choice([[], [None], [draw(rng, n)]])
    return "aten.linear.default", [draw(rng, *sizes, k), draw(rng, n, k), *bias]


def product(rng: random.Random) -> Case:
    m, k, n, b = (rng.randint(1, 4) for _ in range(4))
    kind = rng.choice(["mm", "bmm", "matmul", "addmm"])
    if kind == "bmm":
        return "aten.bmm.default", [draw(rng, b, m, k), draw(rng, b, k, n)]
    if kind == "addmm":
        addend = draw(rng, *rng.choice([(n,), (1, n), (m, n), (m, 1), ()]))
        return "aten.addmm.default", [addend, draw(rng, m, k), draw(rng, k, n)]
    if kind == "mm":
        return "aten.mm.default", [draw(rng, m, k), draw(rng, k, n)]
    stacks = [(), (b,), (1,), (2, b), (2, 1)]
    first = rng.choice([(k,), *((*stack, m, k) for stack in stacks)])
    second = rng.choice([(k,), *((*stack, k, n) for stack in stacks)])
    return "aten.matmul.default", [draw(rng, *first), draw(rng, *second)]


def convolution(rng: random.Random) -> Case:
    dims, groups = rng.randint(1, 3), rng.choice([1, 1, 2])
    inputs, outputs = groups * rng.randint(1, 2), groups * rng.randint(1, 2)
    kernel = [rng.randint(1, 3) for _ in range(dims)]
    samples = [] if rng.random() < 0.15 else [rng.randint(1, 2)]
    x = draw(rng, *samples, inputs, *(rng.randint(5, 6) for _ in range(dims)))

    def each(low: int, high: int) -> list[int]:
        return [rng.randint(low, high)] * rng.choice([1, dims]) if rng.random() < 0.5 else [
            rng.randint(low, high) for _ in range(dims)
        ]  # fmt: skip

    kind = rng.choice(["plain", "padding", "transposed", "any"])
    bias = draw(rng, outputs) if rng.random() < 0.6 else None
    if kind == "plain":
        weight = draw(rng, outputs, inputs // groups, *kernel)
        return f"aten.conv{dims}d.default", [x, weight, bias, each(1, 2), each(0, 1), each(1, 2), groups]
    if kind == "padding":
        weight = draw(rng, outputs, inputs // groups, *kernel)
        return f"aten.conv{dims}d.padding", [x, weight, bias, [1], rng.choice(["same", "valid"]), each(1, 2), groups]
    weight = draw(rng, inputs, outputs // groups, *kernel)
    if kind == "transposed":
        overload = "default" if dims == 1 else "input"
        target = f"aten.conv_transpose{dims}d.{overload}"
        return target, [x, weight, bias, each(2, 2), each(0, 0), each(0, 1), groups, each(1, 2)]
    if len(x.shape) == dims + 1:
        x = x.unsqueeze(0)
    options = [[2] * dims, [0] * dims, [1] * dims, True, [1] * dims, groups]
    return "aten.convolution.default", [x, weight, bias, *options]


def look_up(rng: random.Random) -> Case:
    words = torch.tensor([[rng.randrange(5) for _ in range(3)] for _ in range(rng.randint(1, 3))])
    if rng.random() < 0.5:
        options = rng.choice([[], [-1], [2], [0, False, False]])
        return "aten.embedding.default", [draw(rng, 5, 4), words, *options]
    runs = ((0, 2), (3, 4))
    return "graphpart.embedding_part", [draw(rng, 3, 4), words, runs, 5, rng.choice([-1, 1, 2, 3])]


def padded(rng: random.Random) -> Case:
    weight = draw(rng, 2, 3, 3, 2)
    options = [draw(rng, 2), [1, 2], [0, 0], [1, 1], 1]
    return "graphpart.padded", ["aten.conv2d.default", [1, 0, 0, 2], 0.0, draw(rng, 2, 3, 4, 5), weight, *options]


def experts(rng: random.Random) -> Case:
    pytest.importorskip("transformers.integrations.moe")
    counts = [rng.choice([0, 1, 3]) for _ in range(3)]
    ends = torch.tensor(counts).cumsum(0).int()
    return "transformers.grouped_mm_fallback.default", [draw(rng, sum(counts), 2), draw(rng, 3, 2, 4), ends]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("make", [linear, product, convolution, look_up, padded, experts])
def test_operator(make: Callable[[random.Random], Case], seed: int) -> None:
    """Whichever operands want a gradient, and whichever of them are weights, passed on by a cast or as they are."""
    rng = random.Random(f"{make.__name__} {seed}")
    torch.manual_seed(seed)
    target, args = make(rng)
    step = Step(
        "op", target, tuple(Ref(str(i)) if isinstance(a, Tensor) else a for i, a in enumerate(args)), {}, ("y",)
    )
    floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    wants = [i for i in floats if rng.random() < 0.8] or floats[:1]
    candidates = deferrable([step], {str(i): frozenset([str(i)]) for i in wants}).get(0, ())
    places = tuple(i for i in candidates if rng.random() < 0.8)
    leaves = {i: args[i].clone().requires_grad_() for i in wants}
    passed = {i: leaf.float().double() if rng.random() < 0.5 else leaf for i, leaf in leaves.items()}
    given = [passed.get(i, a) for i, a in enumerate(args)]
    expected_out = kernel_of(target)(*given)
    seed_gradient = torch.randn_like(expected_out)
    expected = torch.autograd.grad(
        expected_out, list(leaves.values()), seed_gradient, allow_unused=True, retain_graph=True
    )
    late: list[Late] = []
    out = deferring_kernel(target)(late, 0, places, *given) if places else expected_out
    assert torch.equal(out, expected_out)
    first = torch.autograd.grad(out, list(leaves.values()), seed_gradient, allow_unused=True)
    weights = [leaves[i] for i in places]
    second = {}
    for i, made, direct in zip(places, *late_gradients(late, weights), strict=True):
        assert made is None or not direct  # what is passed on by a cast is made, what is read itself is left to the sum
        second[i] = made
        for each in direct:
            total = torch.randn_like(leaves[i])
            before, is_own = total.clone(), rng.random() < 0.7
            found, found_is_own = each.add_to(total, is_own)
            assert found_is_own and (found is total if is_own else torch.equal(total, before))
            second[i], _ = each.add_to(second[i], second[i] is not None)
            torch.testing.assert_close(found, before + each.make(), rtol=1e-12, atol=1e-12)
    for i, whole, now in zip(leaves, expected, first, strict=True):
        then = second.get(i)
        found = now if then is None else then if now is None else now + then
        assert whole is not None and found is not None
        torch.testing.assert_close(found, whole, rtol=1e-6 if passed[i] is not leaves[i] else 1e-12, atol=1e-12)


def test_what_the_table_names_has_a_kernel() -> None:
    for target in WEIGHTS:
        if target.startswith("transformers."):
            pytest.importorskip("transformers.integrations.moe")
        assert callable(deferring_kernel(target))


def test_a_weight_gradient_keeps_no_weight_and_no_graph() -> None:
    """What waits is the input and the result's gradient, detached from all that was before."""
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(2, 4, requires_grad=True)
    late: list[Late] = []
    out = deferring_kernel("aten.linear.default")(late, 7, (1,), x * 2, weight)
    torch.autograd.grad(out.sum(), [x, weight], allow_unused=True)
    (found,) = late
    assert found.step == 7 and [tuple(t.shape) for t in found.operands] == [(3, 4)]
    assert all(t.grad_fn is None and not t.requires_grad for t in (*found.operands, found.gradient))


def test_a_value_that_was_changed_meanwhile_is_refused() -> None:
    x, weight = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    late: list[Late] = []
    out = deferring_kernel("aten.linear.default")(late, 0, (1,), x, weight)
    torch.autograd.grad(out.sum(), [weight], allow_unused=True)
    _, ((found,),) = late_gradients(late, [weight])
    x.mul_(2)
    for total in (None, torch.zeros(2, 4)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            found.add_to(total, True)


# --- which weights ----------------------------------------------------------------------------------------------------


def steps(*calls: tuple[str, tuple[Any, ...], str]) -> list[Step]:
    """Steps with strings as references."""
    return [
        Step(result, target, tuple(Ref(a) if isinstance(a, str) else a for a in args), {}, (result,))
        for target, args, result in calls
    ]


def test_weights_are_followed_through_casts_and_parts() -> None:
    found = steps(
        ("aten._to_copy.default", ("w",), "cast"),
        ("aten.t.default", ("cast",), "turned"),
        ("aten.mm.default", ("x", "turned"), "y"),
        ("aten.mul.Tensor", ("y", "scale"), "z"),
        ("aten.linear.default", ("z", "v", "b"), "out"),
    )
    weights = {"w", "scale", "v", "b"}
    assert deferrable(found, carried(found, weights)) == {2: (1,), 4: (1, 2)}
    assert deferred_weights(found, weights) == {"w", "v", "b"}
    assert deferred_weights(found, {"scale", "v"}) == {"v"}


def test_a_weight_that_meets_a_parameter_stays_whole() -> None:
    """An update of the learned queries must not come before the gradient that reads them."""
    found = steps(("aten.t.default", ("queries",), "turned"), ("aten.linear.default", ("turned", "w"), "y"))
    assert deferred_weights(found, {"queries", "w"}) == frozenset()
    assert deferred_weights(found, {"w"}) == {"w"}


@pytest.mark.parametrize("options", [(-1, True), (-1, False, True)])
def test_scaled_and_sparse_look_ups_stay_whole(options: tuple[Any, ...]) -> None:
    assert deferred_weights(steps(("aten.embedding.default", ("w", "x", *options), "y")), {"w"}) == frozenset()


# --- whole models -----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight in three roles: looked up, as a product's, and scaled, which stays in the first part."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=1)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_parameter("scale", nn.Parameter(torch.randn(6)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + torch.tanh(self.first(x)) * self.scale
        x = x + self.frozen(self.second(x)) + (self.first.weight * self.scale).sum(0)
        return nn.functional.linear(x, self.words.weight)


class Experts(nn.Module):
    """Tokens meet a mixture of experts, weighted by a router; some experts get none of the tokens' weight."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.up = nn.Parameter(torch.randn(3, 6, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(self.router(x), -1)
        shares = torch.where(shares < 0.3, 0.0, shares)
        hidden = torch.relu(torch.einsum("bk,ekh->ebh", x, self.up))
        made = torch.bmm(hidden, self.down)
        return (made * shares.T.unsqueeze(-1)).sum(0) + x @ self.up[0] @ self.down[1]


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False),
            nn.ConvTranspose2d(4, 2, 2, stride=2),
            nn.Flatten(),
            nn.Linear(2 * 8 * 8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "tied": (Tied, lambda: torch.randint(0, 11, (5, 3))),
    "experts": (Experts, lambda: torch.randn(5, 6, dtype=torch.float64)),
    "images": (Images, lambda: torch.randn(5, 3, 8, 8, dtype=torch.float64)),
}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("strategy", ["single", "layer", "feature", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, strategy: str, num_microbatches: int) -> None:
    torch.manual_seed(0)
    make, make_x = MODELS[name]
    model, x = make().double(), make_x()
    expected = gradients(copy.deepcopy(model), x)
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    bits = []
    for order in (None, random.Random(1), random.Random(2)):
        parted = gp.partition(copy.deepcopy(model), 2, strategy=strategy, num_microbatches=num_microbatches)
        with split_backward(*[weights_at_random(order)] if order else []) as ran:
            parted(x).square().sum().backward()
        assert ran
        found = parted.grad_dict()
        for key, gradient in expected.items():
            if gradient is None:
                assert found[key] is None
            else:
                torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-14 * largest)
        bits.append(found)
    for other in bits[1:]:
        assert all(g is None or torch.equal(g, other[key]) for key, g in bits[0].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, variant, marks=pytest.mark.xdist_group(name))  # with the traces of test_models
        for name, variant in [
            ("gpt2", "train"),
            ("gpt2", "autocast"),
            ("llama", "bfloat16"),
            ("mixtral", "train"),
            ("resnet", "train"),
        ]
    ],
)
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_zoo(name: str, variant: str, num_microbatches: int) -> None:
    """The models that people train, with their losses, dtypes and tied weights, layer by layer on two workers."""
    with split_backward() as ran:
        check(name, 2, num_microbatches, variant, 1e-5 if variant == "train" else 5e-2)
    assert ran


def test_segments_that_run_again_split_too() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(4))).double(), torch.randn(4, 6)
    expected = gradients(copy.deepcopy(model), x.double())
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=2, recompute=["*"])
    with split_backward(weights_at_random(random.Random(0))) as ran:
        parted(x.double()).square().sum().backward()
    assert ran and any(segment.recompute for segment in parted.plan.program.segments)
    for key, gradient in expected.items():
        torch.testing.assert_close(parted.grad_dict()[key], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("schedule", ["gpipe", "zero-bubble"])
def test_casts_that_a_step_makes_once_are_weights_of_every_microbatch(schedule: str) -> None:
    """Under autocast the cast of a weight is a segment's of its own; its backward waits for all that read it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(copy.deepcopy(model), x)
        parted = gp.partition(model, 2, strategy={"0": 0, "*": 1}, num_microbatches=3, schedule=schedule)
        with split_backward(weights_at_random(random.Random(0))):
            parted(x).square().sum().backward()
    plan = parted.plan
    deferred = {plan.program.wire[n].origin for work in plan.backward.segments.values() for n in work.weights}
    assert deferred == {"segment"}
    for key, gradient in expected.items():
        torch.testing.assert_close(parted.grad_dict()[key], gradient, rtol=2e-2, atol=2e-2)


class Meeting(nn.Module):
    """The gradient of one sum is a product's and an activation's at once, and the activation is read again later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.inner, self.outer = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        y = torch.tanh(stem + self.inner(self.side(x)))
        return stem * self.outer(y)


def test_a_gradient_that_waits_for_a_weight_is_not_added_to() -> None:
    torch.manual_seed(0)
    model, x = Meeting().double(), torch.randn(3, 4, dtype=torch.float64)
    expected = gradients(copy.deepcopy(model), x)
    parted = gp.partition(model, 2, strategy={"stem": 0, "side": 0, "inner": 1, "outer": 0, "": 1})
    with split_backward() as ran:
        parted(x).square().sum().backward()
    readers = [s.name for s in parted.plan.program.segments if "linear" in s.inputs]
    assert ran and len(readers) == 2
    for key, gradient in expected.items():
        torch.testing.assert_close(parted.grad_dict()[key], gradient, rtol=1e-12, atol=1e-14)
