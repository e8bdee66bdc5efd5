"""Normalizations: what is normalized over stays whole."""

from __future__ import annotations

from graphpart.ir.axes import AxisRule, Dim
from graphpart.rules.call import Call, Dims, make_rule, names, single
from graphpart.rules.family import Families, family, line
from graphpart.rules.notation import bind


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
    """Every form of BatchNorm: in training samples and positions are whole, channels never are.

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
    whole = ["none", *(("n", *spatial) if training else ())]
    return make_rule(call, operands, results, extents={"none": 0} if (0,) in call.results else None, whole=whole)


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
    **family("_native_batch_norm_legit_no_training", f"{BATCH} momentum eps", batch_norm),
    # The number of groups is a literal, and a group is normalized as one.
    **line("group_norm", "input num_groups weight bias", "n c ..., _, c, c -> n c ...", whole="c ..."),
    **family("instance_norm", f"{BATCH} use_input_stats", instance_norm),
}  # fmt: skip
