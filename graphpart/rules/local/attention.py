"""Local calls of attention: a causal mask follows the queries."""

from __future__ import annotations

from collections.abc import Mapping

from graphpart.rules.local.cut import CutCall, LocalCall, Localize


def attended(cut: CutCall) -> LocalCall:
    """``scaled_dot_product_attention``: by itself, a part of the queries would think that it comes first."""
    if "l" not in cut.tile or not cut.get("is_causal", False):
        return cut.call()
    kept = {name: value for name, value in cut.op.kwargs.items() if name in ("scale", "enable_gqa")}
    tensors = (cut.get("query"), cut.get("key"), cut.get("value"))
    return LocalCall("graphpart.causal_attention", (*tensors, cut.tile["l"].runs), kept, (0, 1, 2))


LOCAL: Mapping[str, Localize] = {"scaled_dot_product_attention": attended}
"""By operator name."""
