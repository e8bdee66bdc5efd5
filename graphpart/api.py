"""The face: ``partition()`` and ``plan()`` put the passes in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from graphpart.cost import make_cluster
from graphpart.errors import ClusterError, PlanError
from graphpart.ir.cluster import Cluster
from graphpart.ir.program import DEFAULT_DEADLINE_S
from graphpart.module.partitioned import PartitionedModule, partitioned_class
from graphpart.module.planner import Planner
from graphpart.planning.choices import check_alone, check_batch, check_choices
from graphpart.planning.fused_step import ScheduleChoice
from graphpart.planning.make import make_plan
from graphpart.planning.plan import Plan
from graphpart.runtime.executors.launch import Executor
from graphpart.runtime.executors.processes import DistributedExecutor
from graphpart.runtime.executors.threads import LocalExecutor
from graphpart.runtime.parameters.edge_guard import masks_of
from graphpart.runtime.parameters.model_state import ModelState
from graphpart.strategies import Recompute
from graphpart.trace import trace
from graphpart.trace.sample_dims import wished_sample_dims

Devices = int | str | Path | Sequence[str] | Cluster


def partition(
    model: nn.Module,
    devices: Devices | None = None,
    *,
    strategy: Any = "auto",
    strategy_options: Mapping[str, Any] | None = None,
    num_microbatches: int = 1,
    schedule: ScheduleChoice | None = None,
    batch_norm: str = "barrier",
    plan: Plan | str | Path | None = None,
    sample_dims: Mapping[str, int | None] | None = None,
    executor: str = "auto",
    deadline_s: float | None = None,
    wire_dtype: str | None = None,
    memory_reserve: float = 0.0,
    optimizer_bytes_per_element: float = 8,
    recompute: Recompute = "auto",
    offload: bool = False,
) -> PartitionedModule:
    """Split a model over devices; the result is called and trained as the model was.

    The model's parameters are taken over, as ``.to()`` does. Tracing and planning happen at the first call.

    Args:
        model: any ``nn.Module`` that ``torch.export`` accepts.
        devices: a number, names such as ``["cuda:0", "cuda:1"]`` or ``["cpu:0", "cpu:1"]``, a preset, a TOML file
            or a :class:`Cluster`. May be left out where ``plan`` is given.
        strategy: how to split, see :func:`graphpart.planning.make.make_plan`.
        strategy_options: options of that one strategy.
        num_microbatches: parts of the batch, in time, so that devices work at once.
        schedule: in which order ``train_step`` runs them: ``gpipe``, ``1f1b``, ``interleaved``, ``zero-bubble``,
            ``list``, ``auto``, which compares these on the simulator, or ``async`` (or a :class:`graphpart.Async`),
            which updates weights while microbatches are under way and gives other numbers than one device. None is
            ``auto`` for ``train_step``, while forecasts are of plain calls, which always go in GPipe's order.
        batch_norm: ``barrier`` (default, exact) or ``microbatch`` (each microbatch by its own statistics; running
            statistics deferred).
        plan: a plan, or the file of one, made for this model before. It has decided what ``strategy`` and the other
            arguments of planning would decide anew: they are refused beside it.
        sample_dims: per input name (``args[0]``, ``labels``), the dimension that runs over samples, or None if it has
            none; it is taken to be dimension 0 of inputs that share the batch size.
        executor: ``local`` (one process, a worker a device), ``distributed`` (a process a device, under
            ``torchrun``), or ``auto``: distributed where ``torch.distributed`` runs one process a device.
        deadline_s: how long a device waits for one message before it gives up; by default as long as the plan says,
            or 600 s.
        wire_dtype: ``"bfloat16"`` or ``"float16"``: float32 activations, and their gradients, are cast to that between
            devices, which halves their bytes at the price of digits. Parameters, inputs and scalars stay exact.
        memory_reserve: part of each device's memory to leave free when planning.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element to plan for: 8 for AdamW, 4 for SGD
            with momentum, 0 for plain SGD.
        recompute: what runs again for its backward instead of keeping its activations: ``"auto"``, ``"none"``, or
            patterns over module paths, such as ``["transformer.h.*"]``: each module that matches is one group.
        offload: whether what such groups read, which is all that they keep, waits for the backward in pinned host
            memory; for GPUs alone. Forecasts count it as if it stayed.

    Raises:
        GraphpartError: a subclass says what is wrong with the devices, the plan or, at the first call, the model.
    """
    _check_model(model, "partition")
    choices: dict[str, Any] = {
        "strategy": strategy,
        "strategy_options": strategy_options,
        "num_microbatches": num_microbatches,
        "schedule": schedule,
        "batch_norm": batch_norm,
        "sample_dims": sample_dims,
        "wire_dtype": wire_dtype,
        "memory_reserve": memory_reserve,
        "optimizer_bytes_per_element": optimizer_bytes_per_element,
        "recompute": recompute,
        "offload": offload,
    }
    check_choices({**choices, "deadline_s": deadline_s})
    check_alone(plan, choices)
    if plan is not None:
        plan = _planned(plan, deadline_s)
        sample_dims = wished_sample_dims(plan.graph)
    if devices is None:
        if plan is None:
            raise ClusterError("partition() needs devices, for instance graphpart.partition(model, 2)")
        devices = plan.cluster
    cluster = find_cluster(devices)
    check_offload(offload or (plan is not None and plan.offload), cluster)
    if plan is not None and len(plan.cluster) != len(cluster):
        raise PlanError(f"the plan is for {len(plan.cluster)} devices, but there are {len(cluster)}; plan again")
    torch_devices = tuple(_torch_device(d.name) for d in cluster.devices)
    runner = _executor(executor, torch_devices)
    options = {name: value for name, value in choices.items() if name != "sample_dims"}
    options["deadline_s"] = DEFAULT_DEADLINE_S if deadline_s is None else deadline_s
    planner = Planner(cluster, options, plan)
    state = ModelState(model, torch_devices, runner.distributed)
    kind = partitioned_class(type(model))
    return kind(model, cluster, torch_devices, runner, state, planner, sample_dims)


def plan(
    model: nn.Module,
    devices: Devices,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    strategy: Any = "auto",
    strategy_options: Mapping[str, Any] | None = None,
    num_microbatches: int = 1,
    schedule: ScheduleChoice | None = None,
    batch_norm: str = "barrier",
    sample_dims: Mapping[str, int | None] | None = None,
    wire_dtype: str | None = None,
    memory_reserve: float = 0.0,
    optimizer_bytes_per_element: float = 8,
    recompute: Recompute = "auto",
    offload: bool = False,
) -> Plan:
    """Plan a model without running it; parameters and arguments may be on the meta device.

    Args:
        model: the model.
        devices: as for :func:`partition`; presets such as ``"8xH100"`` need no such device here.
        args: example positional arguments.
        kwargs: example keyword arguments.
        strategy: how to split, as for :func:`partition`.
        strategy_options: options of that one strategy.
        num_microbatches: parts of the batch, in time.
        schedule: order of a training step, as for :func:`partition`.
        batch_norm: ``barrier`` or ``microbatch``.
        sample_dims: per input name, the dimension that runs over samples, or None.
        wire_dtype: what float32 activations are cast to between devices, as for :func:`partition`.
        memory_reserve: part of each device's memory to leave free.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element to plan for: 8 for AdamW, 4 for SGD
            with momentum, 0 for plain SGD.
        recompute: what runs again for its backward, as for :func:`partition`.
        offload: whether what that reads waits in host memory, as for :func:`partition`.

    Returns:
        The plan: print it, draw it, save it, or give it to :func:`partition`.
    """
    _check_model(model, "plan")
    if not isinstance(args, (tuple, list)):
        raise PlanError(f"args has to be a tuple of positional arguments, not a {type(args).__name__}; write args=(x,)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise PlanError(f"kwargs has to be a mapping of keyword arguments, not a {type(kwargs).__name__}")
    choices: dict[str, Any] = {
        "num_microbatches": num_microbatches,
        "schedule": schedule,
        "batch_norm": batch_norm,
        "wire_dtype": wire_dtype,
        "memory_reserve": memory_reserve,
        "optimizer_bytes_per_element": optimizer_bytes_per_element,
        "recompute": recompute,
        "offload": offload,
    }
    check_choices({**choices, "sample_dims": sample_dims})
    cluster = find_cluster(devices)
    check_offload(offload, cluster)
    traced = trace(model, tuple(args), dict(kwargs or {}), sample_dims=sample_dims)
    check_batch(traced.graph)
    masks = masks_of(traced.graph, dict(model.named_buffers()))
    return make_plan(
        traced.graph, cluster, masks=masks, strategy=strategy, strategy_options=strategy_options, **choices
    )


def _check_model(model: Any, verb: str) -> None:
    if isinstance(model, PartitionedModule):
        raise PlanError(f"the model is partitioned already; give {verb}() the original: parted.module")
    if not isinstance(model, nn.Module):
        raise PlanError(f"{verb}() takes a torch.nn.Module, not a {type(model).__name__}")


def _planned(plan: Any, deadline_s: float | None) -> Plan:
    """The plan that was given, by itself or as a file."""
    if isinstance(plan, (str, Path)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        raise PlanError(f"plan={plan!r}; give a graphpart.Plan, or the path of a saved one")
    return plan if deadline_s is None else replace(plan, deadline_s=deadline_s)


def check_offload(offload: bool, cluster: Cluster) -> None:
    """Raise a :class:`PlanError` where there is no GPU whose memory the host's could relieve."""
    on_host = [device.name for device in cluster.devices if _torch_device(device.name).type == "cpu"]
    if offload and on_host:
        raise PlanError(
            f"offload=True moves what waits for the backward from GPUs to the host, where {on_host[0]!r} has its "
            "memory already; leave it out, or use GPUs"
        )


def find_cluster(devices: Devices) -> Cluster:
    """The cluster that a description of devices means; CUDA devices of this host are looked at."""
    if isinstance(devices, (list, tuple)):
        devices = [str(d) if isinstance(d, torch.device) else d for d in devices]
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts = {}
    for i in range(found):
        properties = torch.cuda.get_device_properties(i)
        facts[f"cuda:{i}"] = (properties.name, properties.total_memory)
    return make_cluster(devices, num_cuda_devices=found, facts=facts)


def _torch_device(name: str) -> torch.device:
    kind, _, index = name.partition(":")
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, int(index or 0))


def _executor(name: str, devices: tuple[torch.device, ...]) -> Executor[Any]:
    missing = [d for d in devices if d.type == "cuda" and (d.index or 0) >= torch.cuda.device_count()]
    running = dist.is_available() and dist.is_initialized()
    if name == "auto":
        several = running and dist.get_world_size() > 1
        name = "distributed" if several else "local"
    if name == "local":
        if missing:
            raise ClusterError(
                f"{missing[0]} is not on this host, which has {torch.cuda.device_count()} CUDA devices; "
                "use graphpart.plan to plan for devices that are not here"
            )
        return LocalExecutor(devices)
    if name == "distributed":
        if not running:
            raise ClusterError("executor='distributed' needs torch.distributed.init_process_group first (torchrun)")
        if dist.get_world_size() != len(devices):
            world = dist.get_world_size()
            raise ClusterError(
                f"{len(devices)} devices need as many processes, but torch.distributed runs {world}; give {world} "
                "devices, or executor='local' for a model of its own in each process"
            )
        return DistributedExecutor(devices)
    raise ClusterError(f"there is no executor {name!r}; give 'auto', 'local' or 'distributed'")
