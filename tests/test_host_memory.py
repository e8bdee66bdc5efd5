"""Freed memory of the host stays with the process between steps, and goes back when the model goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import gc, json, resource, torch
from torch import nn
import graphpart as gp

torch.set_num_threads(1)
model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.GELU())))
x = torch.randn(4096, 512)
parted = gp.partition(model, ["cpu:0", "cpu:1"])
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
resident = lambda: int(open("/proc/self/statm").read().split()[1])
steps = []
for _ in range(8):
    before = faults()
    parted(x).sum().backward()
    parted.zero_grad()
    steps.append(faults() - before)
kept = resident()
del parted
gc.collect()
print(json.dumps({"steps": steps, "step": min(steps[2:]), "given_back": kept - resident()}))
"""


def pages(**environment: str) -> dict[str, int]:
    """Pages mapped in a settled step, and pages given back with the model, each of 4 KiB or more."""
    unset = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**unset, **environment}, capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only the C library of GNU/Linux can be told")
def test_a_settled_step_maps_no_new_memory_and_the_model_takes_it_along() -> None:
    told = pages()
    assert told["step"] < 500  # of about 50,000 that its values take
    assert told["given_back"] > 10_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only the C library of GNU/Linux can be told")
def test_thresholds_that_the_user_has_set_are_left_alone() -> None:
    assert pages(MALLOC_TRIM_THRESHOLD_="131072")["step"] > 10_000
