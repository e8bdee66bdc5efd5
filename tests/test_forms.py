"""Operators of one form: what lowering finds out once for them is what it would find for each."""

from __future__ import annotations

import itertools
import random
from unittest import mock

import pytest

from graphpart.cost import make_cluster
from graphpart.ir.forms import forms
from graphpart.ir.graph import Graph, Operator, Ref, Source, Value
from graphpart.ir.region import Intervals
from graphpart.lower import lower
from tests.helpers.meshes import in_rounds, random_mesh
from tests.test_large_clusters import chain


def test_repeated_blocks_have_the_forms_of_one() -> None:
    found = forms(chain(5))
    assert len(set(found.values())) == 4  # the table, the first product, whose input needs no gradient, others, sums
    assert found["linear_1"] == found["linear_4"] != found["linear_0"]


def test_literals_of_unlike_types_make_unlike_forms() -> None:
    x = Value("x", (2,), "float32")
    literals = [1, True, 1.0, 0.0, -0.0, float("nan"), [1], (1,), "1", slice(0, 1), [slice(0, 2)]]
    operators = [
        Operator(f"op{i}", "aten.add.Tensor", (Ref("x"), literal), results=(Value(f"op{i}", (2,), "float32"),))
        for i, literal in enumerate([*literals, *literals])
    ]
    graph = Graph("Literals", (Source(x, "input", ("x",)),), tuple(operators), (Ref("op0"),))
    found = list(forms(graph).values())
    assert found == [*range(len(literals)), *range(len(literals))]


@pytest.mark.parametrize("seed", range(8))
def test_programs_are_as_if_each_operator_had_a_form_of_its_own(seed: int) -> None:
    rng = random.Random(seed)
    with mock.patch.multiple("tests.test_large_clusters", WIDTH=48, BATCH=16):
        graph = chain(4)
    cluster = make_cluster(f"{rng.choice([4, 6, 8])}xH100")
    num_microbatches = rng.choice([1, 2, 4])
    placement = random_mesh(graph, cluster, rng, num_microbatches)
    with in_rounds(seed):
        folded = lower(graph, placement, len(cluster), num_microbatches=num_microbatches)
        own = mock.Mock(side_effect=lambda graph: dict(zip((op.name for op in graph.operators), itertools.count())))
        with mock.patch("graphpart.lower.instantiate.forms", own):
            each = lower(graph, placement, len(cluster), num_microbatches=num_microbatches)
    assert own.called
    assert folded == each


def test_what_lies_in_a_set_of_runs() -> None:
    rng = random.Random(0)
    for _ in range(200):
        indices = set(rng.sample(range(20), rng.randint(0, 12)))
        runs = Intervals.indices(indices)
        assert {index for index in range(-2, 23) if index in runs} == indices
