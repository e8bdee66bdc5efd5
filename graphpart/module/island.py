"""A part of a graph that runs as it is, where its inputs are; parameters come to it whole, wherever they live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from graphpart.errors import UnsupportedOperatorError
from graphpart.module.coverage import IslandReport
from graphpart.runtime.parameters.layout import cut
from graphpart.runtime.parameters.model_state import ModelState
from graphpart.runtime.parameters.tiled_tensor import TiledTensor


class Island(nn.Module):
    """A part of a graph that runs as it is.

    Each of several processes runs it for itself: their inputs are the same, and it may draw no random numbers.

    Args:
        state: the model's tensors.
        graph: the part.
        why: what keeps it from being lowered.
    """

    state: ModelState

    def __init__(self, state: ModelState, graph: GraphModule, why: str) -> None:
        super().__init__()
        self.__dict__["state"] = state
        self.graph, self.why = graph, why
        self.flops: float | None = None  # of one forward, from the first on

    def forward(self, *inputs: Any) -> Any:
        """The graph's results.

        Raises:
            UnsupportedOperatorError: if each process would draw random numbers of its own, or a parameter that lies
                elsewhere is changed in place.
        """
        if not self.state.is_spread:
            return self._counted(inputs)
        gathered = self._gathered(inputs)
        inputs = tuple(gathered.get(i, x) for i, x in enumerate(inputs))
        before = torch.get_rng_state(), {i: whole.detach().clone() for i, whole in gathered.items()}
        results = self._counted(inputs)
        if self.state.distributed and not torch.equal(before[0], torch.get_rng_state()):
            raise UnsupportedOperatorError(
                f"what runs as it is draws random numbers, and each process would draw its own ({self.why}); draw "
                "them outside of what cannot be lowered, or use devices of one process"
            )
        if any(not torch.equal(whole.detach(), before[1][i]) for i, whole in gathered.items()):
            raise UnsupportedOperatorError(
                f"what runs as it is changes a parameter in place ({self.why}), of which it has a copy, as parameters "
                "lie on several devices; change it outside of forward, under torch.no_grad()"
            )
        return results

    def _counted(self, inputs: tuple[Any, ...]) -> Any:
        if self.flops is not None or torch.is_inference_mode_enabled():  # where nothing can be counted
            return self.graph(*inputs)
        with _Counter() as counter:
            results = self.graph(*inputs)
        self.flops = counter.flops
        return results

    def _gathered(self, inputs: tuple[Any, ...]) -> dict[int, Tensor]:
        """Those inputs that are parameters, whole, on the device of the others."""
        tensors = {i: x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
        names = {i: self.state.name_of(x) for i, x in tensors.items()}
        own = {i: n for i, n in names.items() if n is not None and isinstance(self.state.tensors[n], nn.Parameter)}
        device = next((x.device for i, x in tensors.items() if i not in own), self.state.devices[0])
        return {i: _Whole.apply(self.state.tensors[n], self.state, n).to(device) for i, n in own.items()}

    @property
    def report(self) -> IslandReport:
        """What runs as it is, and why."""
        operators = tuple(node.name for node in self.graph.graph.nodes if node.op.startswith("call"))
        return IslandReport(operators, self.why, self.flops or 0.0)


class _Counter(TorchDispatchMode):
    """Counts the FLOPs of what runs. Torch's own gives the first branch's result of any ``cond``.

    Attributes:
        flops: of one forward.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*(self._counting(x) if callable(x) else x for x in args), **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is None and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if count is not None:
            self.flops += float(count(*args, **kwargs, out_val=result))
        return result

    def _counting(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """What an operator may run, counted if it does."""

        def run(*operands: Any) -> Any:
            with self:
                return body(*operands)

        return run


class _Whole(torch.autograd.Function):
    """A parameter's whole value, on this process (collective over processes), whose gradient goes to its tiles."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, state: ModelState, name: str) -> Tensor:
        ctx.state, ctx.name = state, name
        whole = state.whole(name, parameter.detach())
        return whole if isinstance(parameter, TiledTensor) else whole.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        state, name = ctx.state, ctx.name
        parameter = state.tensors[name]
        if not isinstance(parameter, TiledTensor):
            return gradient.to(parameter.device), None, None
        tiles = parameter.tiling.local(state.rank)
        parts = {home.region: cut(gradient, home.region).to(home.device) for home in tiles}
        return state.gradient(name, parts), None, None
