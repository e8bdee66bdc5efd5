"""Damaged and hostile files: random changes of the plain data that a good one holds."""

from __future__ import annotations

import copy
import random
from typing import Any

NUMBERS = (
    -1, 0, 1, 2, 3, 7, -(10**9), 8_000_000_000, 2**31, 2**63, 10**40, 10**400, 0.5, -0.0, 1e-320, 1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", "x", "0", "auto", "batch", "linear", "float32", "int64", "complex64", "parameter", "input", "args[0]", "b",
    "0:1", "0:99999999999", "5:2", "-3:4", "0:3,1", ",", "∅", "aten.relu.default", "aten.view.default",
    "<<B>x</B>>, URL=\"javascript:alert(1)\"] //", "<script>alert(1)</script>", "\\N\\G\\E\"'", "a\x1b[31mb\x00\ud800",
    "x" * 100_000, "../../etc/passwd", "cuda:99", "H100",
)  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], [None], {"ref": "nothing"}, {"ref": 3}, {"float": "nan"}, {"dict": 1})


def deep(depth: int) -> Any:
    """A list in a list, and so on."""
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


def mutant(data: Any, seed: int, most: int = 3) -> Any:
    """A copy with one to ``most`` random changes.

    Args:
        data: objects, lists, texts and numbers, as JSON and TOML have them.
        seed: the same one gives the same changes.
        most: changes at most.
    """
    rng = random.Random(seed)
    found = copy.deepcopy(data)
    for _ in range(rng.randint(1, most)):
        places = list(_places(found))
        if places:
            _change(rng, *rng.choice(places), texts=[v for c, k in places if isinstance(v := c[k], str)])
    return found


def _places(data: Any) -> Any:
    """Every container with each of its keys."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield data, key
        yield from _places(data[key])


def _change(rng: random.Random, container: Any, key: Any, texts: list[str]) -> None:
    value = container[key]
    kind = rng.randrange(10)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(value))
    elif kind == 2 and isinstance(container, list):
        rng.shuffle(container)
    elif kind == 3 and isinstance(container, dict):
        container[rng.choice([*TEXTS, *texts])] = container.pop(key)
    elif kind == 4:
        container[key] = copy.deepcopy(rng.choice(OTHERS))
    elif kind == 5:
        container[key] = deep(rng.choice((3, 40, 80)))
    elif isinstance(value, str) and kind < 9:
        container[key] = rng.choice([*TEXTS, *texts])
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and kind < 9:
        container[key] = rng.choice([*NUMBERS, value + 1, value - 1, -value, value * 1000])
    else:
        container[key] = rng.choice([*NUMBERS, *texts, *TEXTS])
