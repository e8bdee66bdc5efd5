"""Traces that several tests share: making one takes most of a small test's time, and watching the call some of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from graphpart.module import whole as whole_module
from graphpart.trace import Traced
from graphpart.trace.dynamo.watch import Bindings, Watched


class _Holding:
    """Guards of a call that is known to go as its trace."""

    def hold(self, bindings: Bindings) -> bool:
        return True

    def value(self, expression: str, bindings: Bindings) -> Any:
        raise AssertionError("nothing is read from around the model")


@contextlib.contextmanager
def traced_as(traced: Traced) -> Iterator[None]:
    """Partitioned models take this trace instead of making their own, and do not watch the call."""
    watched = Watched(_Holding(), (), (), (), ((),), is_plain=True)  # type: ignore[arg-type]
    with (
        mock.patch.object(whole_module, "trace", lambda *_, **__: traced),
        mock.patch.object(whole_module, "watch", lambda *_, **__: watched),
    ):
        yield
