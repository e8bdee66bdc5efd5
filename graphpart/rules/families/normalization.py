"""Normalizations: what is normalized over stays whole."""

from __future__ import annotations

from graphpart.ir.axes import AxisRule, Dim
from graphpart.rules.call import Call, Dims, make_rule, names, single
from graphpart.rules.notation import bind
from graphpart.rules.table import Families, family


def layer_norm(call: Call) -> AxisRule | None:
    """``layer_norm`` and ``rms_norm``: the last dimensions whole; statistics keep them with extent 1."""
    count = len(call.get("normalized_shape"))
    leading = names("b", call.rank("input") - count)
    own = names("s", count)
    dims = single([*leading, *own])
    statistics = (*single(leading), *((),) * count)
    operands = {"input": [dims], "weight": [single(own)], "bias": [single(own)]}
    return make_rule(call, operands, [dims, *[statistics] * (len(call.results) - 1)], whole=own)


def batch_norm(call: Call) -> AxisRule | None:
    """Every form of BatchNorm: in training samples and positions are averaged over, channels are independent.

    As a traced model trains, lowering can take the averages apart into sums and a count.

    The extra results (saved and running statistics) have the channel axis only, and what they lack cannot be
    cut. In evaluation some kernels return the saved statistics empty; these carry every axis, times 0.
    """
    training = call.get("training", "no_training" not in call.target)
    spatial = names("s", call.rank("input") - 2)
    dims = single(["n", "c", *spatial])
    channels: Dims = (("c",),)
    empty: Dim = ("n", "c", *spatial, "none")
    results = [dims, *((empty,) if shape == (0,) else channels for shape in call.results[1:])]
    operands = {"input": [dims]} | {name: [channels] for name in call.names[1:5]}
    averaged = ("n", *spatial) if training else ()
    return make_rule(
        call,
        operands,
        results,
        extents={"none": 0} if (0,) in call.results else None,
        whole=["none", *averaged],
        rewritten=averaged if "legit_functional" in call.target or "no_stats" in call.target else (),
    )


def group_norm(call: Call) -> AxisRule | None:
    """``group_norm``: samples and whole groups cut; a group is normalized as one."""
    groups = call.get("group" if "native" in call.target else "num_groups")
    tensors = {"input": "n (g c) ...", "weight": "(g c)", "bias": "(g c)"}
    line = ", ".join(tensors.get(name, "_") for name in call.names) + " -> n (g c) ..."
    line += ", n g" * (len(call.results) - 1)
    return bind(call, line, whole="c ...", extents={"g": groups})


def instance_norm(call: Call) -> AxisRule | None:
    """``instance_norm``: samples and channels cut; running statistics average over samples, so none then."""
    if call.has("running_mean") or call.has("running_var"):
        return None
    return bind(call, "n c ..., c, c -> n c ...", whole="...")


BATCH = "input weight bias running_mean running_var"

FAMILIES: Families = {
    **family("layer_norm rms_norm native_layer_norm _fused_rms_norm", "input normalized_shape weight bias", layer_norm),
    # rms_norm's fourth argument is eps, a number: the name it goes by here does no harm.
    **family("batch_norm _native_batch_norm_legit_functional native_batch_norm",
             f"{BATCH} training momentum eps", batch_norm),
    **family("_native_batch_norm_legit.no_stats", "input weight bias training momentum eps", batch_norm),
    **family("_native_batch_norm_legit_no_training", f"{BATCH} momentum eps", batch_norm),
    **family("group_norm", "input num_groups weight bias", group_norm),
    **family("native_group_norm", "input weight bias N C HxW group", group_norm),
    **family("instance_norm", f"{BATCH} use_input_stats", instance_norm),
}  # fmt: skip
