"""Losses: samples cut where nothing is reduced, add up under a sum, and are rewritten to that under a mean.

Lowering turns a mean into a sum and a count, and a cross-entropy that is cut along its classes into a maximum, a sum
of exponentials and a picked score per part.
"""

from __future__ import annotations

from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call, broadcast, make_rule
from graphpart.rules.notation import bind
from graphpart.rules.table import Families, family

NONE, MEAN, SUM = 0, 1, 2
"""Torch's reductions as it numbers them."""


def class_loss(call: Call) -> AxisRule | None:
    """Cross-entropy and negative log-likelihood: ``self`` is ``[class]`` or ``[batch, class, ...]``.

    The target holds class indices, or probabilities in the shape of ``self``.
    """
    reduction = call.get("reduction", MEAN)
    scores, rest = ("c", "") if call.rank("self") == 1 else ("n c ...", "n ...")
    target = scores if call.rank("self") == call.rank("target") else rest
    line = f"{scores}, {target}, c -> {rest if reduction == NONE else ''}"
    line += ", " * (len(call.results) - 1)
    plain = len(call.results) == 1
    rewritten = rest if reduction == MEAN and plain else ""
    indices = call.rank("self") != call.rank("target")
    if "cross_entropy" in call.target and indices and not call.has("weight") and not call.get("label_smoothing", 0.0):
        rewritten += " c"
    return bind(call, line, sums=rest if reduction == SUM else "", whole="c", rewritten=rewritten)


def element_loss(call: Call) -> AxisRule | None:
    """Losses of one element each; operands broadcast."""
    reduction = call.get("reduction", MEAN)
    operands, dims = broadcast([tuple(call.shape_of(ref.name)) for _, _, ref in call.tensors()])
    axes = [axis for dim in dims for axis in dim]
    return make_rule(
        call,
        operands,
        [dims if reduction == NONE else ()],
        sums=axes if reduction == SUM else (),
        rewritten=axes if reduction == MEAN else (),
    )


FAMILIES: Families = {
    **family("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward nll_loss2d_forward",
             "self target weight reduction ignore_index label_smoothing", class_loss),
    **family("mse_loss l1_loss smooth_l1_loss huber_loss kl_div soft_margin_loss",
             "self target reduction", element_loss),
    **family("binary_cross_entropy", "self target weight reduction", element_loss),
    **family("binary_cross_entropy_with_logits", "self target weight pos_weight reduction", element_loss),
}  # fmt: skip
