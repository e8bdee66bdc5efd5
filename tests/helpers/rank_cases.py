"""What two processes may do differently: the same calls, changed on rank 1."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphpart as gp

WIDTH = 6
DEADLINE_S = 60.0


class Net(nn.Module):
    """Linear layers, all of which a case may change on one process."""

    def __init__(
        self, depth: int = 2, width: int = WIDTH, act: Callable[[Tensor], Tensor] = torch.relu, tied: bool = False
    ) -> None:
        super().__init__()
        sizes = itertools.pairwise([WIDTH, *[width] * (depth - 1), WIDTH])
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)
        if tied:
            self.layers[1].weight = self.layers[0].weight
        self.act = act
        self.scale = 1.0
        self.shift = torch.zeros(WIDTH)

    def forward(self, x: Tensor, flag: bool = True) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x)) * self.scale
        return x + self.shift if flag else x


class Renamed(Net):
    """The same under another name."""


class TwoOutputs(Net):
    """A model with two results."""

    def forward(self, x: Tensor, flag: bool = True) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x, flag), self.layers[0](x).mean()


class Refused(Net):
    """A model that cannot be called."""

    def forward(self, x: Tensor, flag: bool = True) -> Tensor:
        return self.missing(x)


Each = Callable[[int], dict[str, Any]]
"""What call number ``i`` has beside the others."""


def nothing(_: int) -> dict[str, Any]:
    """All calls are alike."""
    return {}


def _make(options: dict[str, Any]) -> SimpleNamespace:
    """A partitioned model and its batch; takes out of the options what it uses."""
    torch.manual_seed(0)
    sizes = {k: options.pop(k) for k in ("depth", "width", "act", "tied") if k in options}
    model = options.pop("model", Net)(**sizes)
    options.pop("change", lambda model: None)(model)
    choices = {"strategy": {"layers.0": 0, "*": 1}, "deadline_s": DEADLINE_S, **options}
    dtype = next(model.parameters()).dtype
    parted = gp.partition(model, 2, **choices)
    return SimpleNamespace(parted=parted, x=torch.ones(4, WIDTH, dtype=dtype), y=torch.zeros(4, WIDTH, dtype=dtype))


def _optimizer(parted: nn.Module, kind: Any = torch.optim.SGD, groups: int = 1, **hyper: Any) -> torch.optim.Optimizer:
    parameters = list(parted.parameters())
    return kind([{"params": parameters[i::groups]} for i in range(groups)], **{"lr": 0.1, **hyper})


def step(*, steps: int = 1, each: Each = nothing, optimizer: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Fused steps."""
    made = _make(options)
    own = _optimizer(made.parted, **(optimizer or {}))
    for i in range(steps):
        keywords = {"optimizer": own, "loss_fn": F.mse_loss, "target": made.y, **each(i)}
        own.param_groups[0]["lr"] = keywords.pop("lr", own.param_groups[0]["lr"])
        with keywords.pop("around", torch.enable_grad)():
            made.parted.train_step(made.x, **keywords)


def forward(*, calls: int = 1, each: Each = nothing, **options: Any) -> None:
    """Plain calls, without backward."""
    made = _make(options)
    for i in range(calls):
        keywords = {"x": made.x, **each(i)}
        made.parted.train(keywords.pop("training", True))
        with keywords.pop("around", torch.enable_grad)():
            made.parted(**keywords)


def loop(
    *,
    loss: Callable[[Any], Tensor] = lambda out: out.square().mean(),
    lrs: tuple[float, ...] = (0.1,),
    optimizer: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """A plain training loop."""
    made = _make(options)
    own = _optimizer(made.parted, **(optimizer or {}))
    for lr in lrs:
        own.param_groups[0]["lr"] = lr
        own.zero_grad()
        loss(made.parted(made.x)).backward()
        own.step()


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def _version(_: nn.Module) -> None:
    gp.__version__ = "0.0.9"


@dataclass(frozen=True)
class RankCase:
    """One difference.

    Attributes:
        run: what rank 0 does.
        want: what the error says, a pattern.
        changed: options of rank 1.
        same: options of both.
        other: what rank 1 does instead; None for the same.
    """

    run: Callable[..., None]
    want: str
    changed: Mapping[str, Any]
    same: Mapping[str, Any]
    other: Callable[..., None] | None

    def __call__(self, rank: int) -> str:
        """Run it; returns the error, or that there is none."""
        version = gp.__version__
        try:
            run = (self.other or self.run) if rank else self.run
            run(**{**self.same, **(self.changed if rank else {})})
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            gp.__version__ = version
        return "no error"


def case(run: Callable[..., None], want: str, *, same: Any = (), other: Any = None, **changed: Any) -> RankCase:
    """A case, with what rank 1 has otherwise."""
    return RankCase(run, want, changed, dict(same), other)


CALLS = {
    "name": case(forward, "the call: rank 1 has forward of Renamed where rank 0 has forward of Net", model=Renamed),
    "kind of call": case(forward, "the call: rank 1 has train_step of Net where rank 0 has forward of Net", other=step),
    "refused": case(forward, r"the call: rank 1 has an error before forward of Refused \(TraceError", model=Refused),
    "refused plan": case(step, r"an error before train_step of Net \(Placement", strategy={"nowhere": 0}),
    "step without gradients": case(
        step,
        r"rank 1 has an error before train_step of Net \(AutogradError: .* where rank 0 has train_step of Net",
        each=lambda i: {"around": torch.no_grad},
    ),
    "no backward": case(
        loop,
        "the call: rank 1 has a step of an optimizer where rank 0 has backward of Net",
        loss=lambda out: SimpleNamespace(backward=lambda: None),
    ),
}
GRAPHS = {
    "activation": case(
        step,
        r"the graph: rank 1 has aten.tanh.default .*\(rank_cases.py:\d+\) where rank 0 has aten.relu.default",
        act=torch.tanh,
    ),
    "depth": case(step, "rank 1 has parameter layers.2.weight .* where rank 0 has no more", depth=3),
    "less deep": case(
        forward, "rank 0 has parameter layers.2.weight .* where rank 1 has no more", same={"depth": 3}, depth=2
    ),
    "width": case(step, r"layers.0.weight float32 \[8, 6\], trainable where rank 0 has float32 \[6, 6\]", width=8),
    "dtype": case(step, r"the arguments: rank 1 has args\[0\] torch.float64", change=nn.Module.double),
    "tied": case(step, "rank 1 has parameter layers.0.weight .*also called layers.1.weight", tied=True),
    "frozen": case(
        step,
        "layers.1.weight float32 .6, 6. where rank 0 has .*trainable",
        change=lambda model: model.layers[1].weight.requires_grad_(False),
    ),
    "number": case(step, "the graph: rank 1 has aten.mul.*0.5", change=lambda model: setattr(model, "scale", 0.5)),
    "constant": case(forward, "the arguments: rank 1 has leaf 1 .*float32", change=lambda model: model.shift.fill_(1)),
    "loss": case(step, r"the graph: rank 1 has aten.* where rank 0 has aten", each=lambda i: {"loss_fn": F.l1_loss}),
    "outputs wanted": case(step, "the graph: rank 1 has output", each=lambda i: {"return_outputs": True}),
}
MODES = {
    "eval": case(
        forward,
        "the mode: rank 1 has the model in eval mode where rank 0 has in training mode",
        each=lambda i: {"training": False},
    ),
    "part in eval": case(
        step, "the mode: rank 1 has module layers.1 in eval mode", change=lambda model: model.layers[1].eval()
    ),
    "autocast": case(
        step,
        "the mode: rank 1 has autocast on cpu torch.bfloat16 where rank 0 has off",
        each=lambda i: {"around": _autocast},
    ),
    "no grad": case(
        forward, "the mode: rank 1 has grad mode off where rank 0 has on", each=lambda i: {"around": torch.no_grad}
    ),
    "forms that both know": case(
        forward,
        "the mode: rank 1 has grad mode off",
        same={"calls": 3, "each": lambda i: {"around": torch.no_grad} if i == 1 else {}},
        each=lambda i: {"around": torch.no_grad} if i else {},
    ),
}
ARGUMENTS = {
    "shape": case(forward, r"the arguments: rank 1 has x .*\[5, 6\]", each=lambda i: {"x": torch.ones(5, WIDTH)}),
    "values": case(
        step, "the arguments: rank 1 has target .*DistributedSampler", each=lambda i: {"target": torch.ones(4, WIDTH)}
    ),
    "flag": case(
        forward,
        "the arguments: rank 1 has .* False where rank 0 has True",
        same={"each": lambda i: {"flag": True}},
        each=lambda i: {"flag": False},
    ),
    "gradient": case(
        forward,
        "the arguments: rank 1 has x .*requires_grad=True",
        each=lambda i: {"x": torch.ones(4, WIDTH, requires_grad=True)},
    ),
}
PLANS = {
    "placement": case(
        step,
        "the plan: rank 1 has aten.linear.default at layers.1 .*on device 0 where rank 0 has on device 1",
        strategy={"layers.0": 0, "layers.1": 0, "*": 1},
    ),
    "strategy": case(forward, "the choices: rank 1 has strategy feature where rank 0 has by hand", strategy="feature"),
    "microbatches": case(step, "the choices: rank 1 has num_microbatches 2 where rank 0 has 1", num_microbatches=2),
    "schedule": case(
        step,
        "the choices: rank 1 has schedule 'gpipe' where rank 0 has '1f1b'",
        same={"num_microbatches": 2, "schedule": "1f1b"},
        schedule="gpipe",
    ),
    "wire dtype": case(forward, "the choices: rank 1 has wire_dtype 'bfloat16'", wire_dtype="bfloat16"),
    "recompute": case(step, "the choices: rank 1 has recompute", recompute=["layers.1"]),
    "versions": case(forward, "versions: rank 1 has graphpart 0.0.9 where", change=_version),
    "weights": case(
        forward,
        "the weights: rank 1 has layers.1.bias",
        same={"check_weights": True},
        change=lambda model: nn.init.ones_(model.layers[1].bias),
    ),
}
UPDATES = {
    "kind": case(
        step, "the update: rank 1 has kind of optimizer torch.optim.adamw", optimizer={"kind": torch.optim.AdamW}
    ),
    "lr": case(
        step, "the update: rank 1 has lr of group 0 of the optimizer 0.2 where rank 0 has 0.1", optimizer={"lr": 0.2}
    ),
    "later lr": case(
        step,
        "the update: rank 1 has lr of group 0 of the optimizer 0.05 where",
        same={"steps": 2},
        each=lambda i: {"lr": 0.1 / (i + 1)},
    ),
    "momentum": case(step, "the update: rank 1 has momentum of group 0", optimizer={"momentum": 0.9}),
    "groups": case(step, "the update: rank 1 has group 0 of the optimizer 2 parameters", optimizer={"groups": 2}),
    "no optimizer": case(step, "the update: rank 1 has keep_gradients True", each=lambda i: {"optimizer": None}),
    "clipping": case(
        step,
        "the update: rank 1 has clip_grad_norm 0.5 where rank 0 has None",
        each=lambda i: {"clip_grad_norm": 0.5},
    ),
    "scaler": case(
        step, "the update: rank 1 has scaler GradScaler", each=lambda i: {"scaler": torch.amp.GradScaler("cpu")}
    ),
    "kind in a loop": case(
        loop, "the optimizer: rank 1 has kind of optimizer torch.optim.rmsprop", optimizer={"kind": torch.optim.RMSprop}
    ),
    "groups in a loop": case(loop, "the optimizer: rank 1 has group 0", optimizer={"groups": 2}),
    "later lr in a loop": case(
        loop,
        "the optimizer of the last step: rank 1 has lr of group 0 of the optimizer 0.2",
        same={"lrs": (0.1, 0.1, 0.1)},
        lrs=(0.1, 0.2, 0.1),
    ),
    "loss in a loop": case(
        loop, "gradients that backward of Net begins with: rank 1 has", loss=lambda out: 3 * out.square().mean()
    ),
    "output in a loop": case(
        loop,
        "outputs that got a gradient: rank 1",
        same={"model": TwoOutputs, "loss": lambda out: out[0].mean()},
        loss=lambda out: out[1],
    ),
}
CASES = {**CALLS, **GRAPHS, **MODES, **ARGUMENTS, **PLANS, **UPDATES}
