"""Why an operator is computed whole, in words for ``plan.explain()``."""

from __future__ import annotations

REASONS = {
    "nonzero": "the shape of its result depends on the data",
    "masked_select": "the shape of its result depends on the data",
    "unique": "the shape of its result depends on the data",
    "unique2": "the shape of its result depends on the data",
    "bincount": "the shape of its result depends on the data",
    "item": "it turns a tensor into a Python number",
    "_local_scalar_dense": "it turns a tensor into a Python number",
    "as_strided": "it addresses memory, not axes",
    "as_strided_copy": "it addresses memory, not axes",
    "lstm": "packed sequences mix samples along one axis",
    "gru": "packed sequences mix samples along one axis",
    "ctc_loss": "its alignments run along the whole sequence",
    "instance_norm": "its running statistics average over the samples",
    "embedding_bag": "its bags are not an axis",
    "sym_size": "it reads a size",
}


KEEPS_STATE = frozenset(["instance_norm"])
"""Operators that update an operand behind their schema's back (running statistics), in the uses that have no rule."""


def may_repeat(target: str, has_rule: bool) -> bool:
    """Whether an operator may run on several devices alike: not if it keeps a state, or nothing is known of it.

    Args:
        target: such as ``aten.nonzero.default``.
        has_rule: whether it has an axis rule.
    """
    namespace, _, rest = target.partition(".")
    return has_rule or (namespace in ("aten", "graphpart") and rest.partition(".")[0] not in KEEPS_STATE)


def reason_without_rule(target: str) -> str:
    """Why an operator has no axis rule.

    Args:
        target: such as ``aten.nonzero.default``.

    Returns:
        A clause that completes "it is computed whole because …".
    """
    namespace, _, rest = target.partition(".")
    name = rest.partition(".")[0]
    if namespace == "aten":
        if name in REASONS:
            return REASONS[name]
        if name.startswith(("linalg_", "fft_", "_fft_")):
            return "it works on whole matrices or spectra"
        return f"no axis rule describes this use of aten.{name}"
    return f"graphpart does not know {namespace}'s operators and cannot tell which of their axes are independent"
