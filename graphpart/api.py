"""``partition()`` makes a module that plans at its first call; ``plan()`` traces and plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import nn

from graphpart.cost import make_cluster
from graphpart.errors import ArgumentError, ClusterError, PlanError
from graphpart.ir.cluster import Cluster, Device
from graphpart.module.partitioned import PartitionedModule, partitioned_class
from graphpart.module.planner import Planner
from graphpart.planning.choices import ChoiceKeywords, Choices, differing, takes_choices
from graphpart.planning.make import make_plan
from graphpart.planning.plan import Plan
from graphpart.runtime.executors.launch import Executor
from graphpart.runtime.executors.processes import DistributedExecutor
from graphpart.runtime.executors.threads import LocalExecutor
from graphpart.runtime.parameters.edge_guard import masks_of
from graphpart.runtime.parameters.model_state import ModelState
from graphpart.strategies import check_devices
from graphpart.trace import trace
from graphpart.trace.sample_dims import wished_sample_dims

Devices = int | str | Path | Sequence[str] | Cluster


@takes_choices
def partition(
    model: nn.Module,
    devices: Devices | None = None,
    *,
    plan: Plan | str | Path | None = None,
    executor: str = "auto",
    check_weights: bool = False,
    **choices: Unpack[ChoiceKeywords],
) -> PartitionedModule:
    """Split a model over devices; the result is called and trained as the model was.

    The model's parameters are taken over, as ``.to()`` does. Tracing and planning happen at the first call.

    Args:
        model: any ``nn.Module`` that ``torch.export`` accepts.
        devices: a number, names such as ``["cuda:0", "cuda:1"]`` or ``["cpu:0", "cpu:1"]`` (``"cuda:0#0"``,
            ``"cuda:0#1"`` for workers that share one card), a preset, a TOML file or a :class:`Cluster`. May be left
            out where ``plan`` is given.
        plan: a plan, or the file of one, made for this model before. It has decided what ``strategy`` and the other
            choices would decide anew: they are refused beside it, but for ``deadline_s``.
        executor: ``local`` (one process, a worker a device), ``distributed`` (a process a device, under
            ``torchrun``), or ``auto``: distributed where ``torch.distributed`` runs one process a device.
        check_weights: whether processes compare at the first call what parameters and buffers hold, too. By default
            each keeps what it has, since checkpoints may be loaded later, and made with other seeds.
        **choices: ``strategy``, ``num_microbatches``, ``schedule``, … as keywords, see :class:`graphpart.Choices`.

    Raises:
        GraphpartError: a subclass says what is wrong with the devices, the plan or, at the first call, the model.
    """
    _check_model(model, "partition")
    if plan is None:
        decided = Choices(**choices)
    else:
        plan = _planned(plan, choices)
        decided = replace(plan.choices, sample_dims=wished_sample_dims(plan.graph))
    if devices is None:
        if plan is None:
            raise ClusterError("partition() needs devices, for instance graphpart.partition(model, 2)")
        devices = plan.cluster
    cluster = find_cluster(devices)
    check_devices(decided.strategy, len(cluster))
    check_offload(decided.offload, cluster)
    if plan is not None and len(plan.cluster) != len(cluster):
        raise PlanError(f"the plan is for {len(plan.cluster)} devices, but there are {len(cluster)}; plan again")
    torch_devices = tuple(_torch_device(d) for d in cluster.devices)
    runner = _executor(executor, torch_devices)
    planner = Planner(cluster, decided, plan)
    state = ModelState(model, torch_devices, runner.distributed, check_weights)
    kind = partitioned_class(type(model))
    return kind(model, cluster, torch_devices, runner, state, planner, decided.sample_dims)


@takes_choices
def plan(
    model: nn.Module,
    devices: Devices,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    **choices: Unpack[ChoiceKeywords],
) -> Plan:
    """Plan a model without running it; parameters and arguments may be on the meta device.

    Args:
        model: the model.
        devices: as for :func:`partition`; presets such as ``"8xH100"`` need no such device here.
        args: example positional arguments.
        kwargs: example keyword arguments.
        **choices: ``strategy``, ``num_microbatches``, ``schedule``, … as keywords, see :class:`graphpart.Choices`.

    Returns:
        The plan: print it, draw it, save it, or give it to :func:`partition`.

    Raises:
        GraphpartError: a subclass says what is wrong with the arguments, the devices or the model.
    """
    _check_model(model, "plan")
    if not isinstance(args, (tuple, list)):
        kind = type(args).__name__
        raise ArgumentError(f"args has to be a tuple of positional arguments, not a {kind}; write args=(x,)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ArgumentError(f"kwargs has to be a mapping of keyword arguments, not a {type(kwargs).__name__}")
    decided = Choices(**choices)
    cluster = find_cluster(devices)
    check_devices(decided.strategy, len(cluster))
    check_offload(decided.offload, cluster)
    graph = trace(model, tuple(args), dict(kwargs or {}), sample_dims=decided.sample_dims).graph
    return make_plan(graph, cluster, decided, masks=masks_of(graph, dict(model.named_buffers())))


def _check_model(model: Any, verb: str) -> None:
    if isinstance(model, PartitionedModule):
        raise ArgumentError(f"the model is partitioned already; give {verb}() the original: parted.module")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{verb}() takes a torch.nn.Module, not a {type(model).__name__}")


def _planned(plan: Any, choices: ChoiceKeywords) -> Plan:
    """The plan that was given, by itself or as a file.

    Raises:
        ArgumentError: if choices beside it would be of no effect, since it has made them already; it names them.
    """
    given = [name for name in differing(choices) if name != "deadline_s"]
    if given:
        raise ArgumentError(
            f"{', '.join(given)} cannot be combined with plan=, which fixes {'it' if len(given) == 1 else 'them'}; "
            f"drop {'it' if len(given) == 1 else 'them'}, or make a new plan: "
            f"graphpart.plan(model, devices, args, {given[0]}=…)"
        )
    if isinstance(plan, (str, Path)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        raise ArgumentError(f"plan={plan!r}; give a graphpart.Plan, or the path of a saved one")
    deadline_s = choices.get("deadline_s")
    return plan if deadline_s is None else replace(plan, choices=replace(plan.choices, deadline_s=deadline_s))


def check_offload(offload: bool, cluster: Cluster) -> None:
    """Raise an :class:`~graphpart.errors.ArgumentError` where there is no GPU whose memory the host's could relieve."""
    on_host = [device.name for device in cluster.devices if _torch_device(device).type == "cpu"]
    if offload and on_host:
        raise ArgumentError(f"offload=True is for GPUs, but {on_host[0]!r} is a CPU; drop it or use GPUs only")


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


def _torch_device(device: Device) -> torch.device:
    kind, _, index = device.place.partition(":")
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
    raise ArgumentError(f"there is no executor {name!r}; give 'auto', 'local' or 'distributed'")
