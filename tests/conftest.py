"""Settings for all tests: one thread a worker, and the same random examples on every run.

``GRAPHPART_SEED=7 pytest`` tries other ones; a failure prints the seed or the blob that repeats it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from tests.helpers.tiers import FAST, MEASURED, mark_long, mark_slow

settings.register_profile("ci", deadline=None, print_blob=True, derandomize="GRAPHPART_SEED" not in os.environ)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def first_seed() -> int:
    """Where the seeds of random examples start."""
    return int(os.environ.get("GRAPHPART_SEED", "0")) * 10_000


@pytest.hookimpl(tryfirst=True)  # before the tests of other tiers are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[MEASURED], config.stash[FAST] = mark_slow(items)
    mark_long(items)
