"""Which operators of real models have an axis rule, and what the rules say of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from graphpart.errors import GraphError
from graphpart.ir.axes import AxisRule
from graphpart.ir.graph import Ref
from graphpart.rules import reason_without_rule, rule_for
from graphpart.rules.call import Call
from graphpart.rules.factor import factor
from graphpart.rules.flops import flops
from graphpart.rules.lookup import FAMILIES
from graphpart.rules.notation import bind, parse
from tests.helpers.zoo import MODELS as ZOO
from tests.test_models import prepared

transformers = pytest.importorskip("transformers")

WITHOUT_RULE: set[str] = set()
"""Operators of the models below that are computed whole, by name."""

NOT_OPERATORS = {"aten._assert_tensor_metadata.default"}
"""What tracing drops."""

IDS = torch.arange(14).reshape(2, 7) % 11
TEXT = {"input_ids": IDS, "labels": IDS, "use_cache": False}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {**SMALL, **WORDS, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 1, "n_embd": 32, "n_head": 4, **WORDS}, TEXT),
    "BERT": ("BertForMaskedLM", "BertConfig", {**SMALL, "vocab_size": 60}, {"input_ids": IDS, "labels": IDS}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, TEXT),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"num_layers": 1, "d_model": 32, "num_heads": 4, "d_ff": 48, "d_kv": 8, **WORDS, "decoder_start_token_id": 0},
        TEXT,
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 32, "patch_size": 16}, IMAGE),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        IMAGE,
    ),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 4}, TEXT),
}


def calls(model: torch.nn.Module, inputs: dict[str, Any]) -> Iterator[tuple[str, AxisRule | None]]:
    """The rule of every operator of an exported model."""
    program = torch.export.export(model, (), inputs, strict=False).run_decompositions({})
    shapes = {}
    for node in program.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shapes[node.name] = tuple(value.shape)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if str(node.target) in NOT_OPERATORS:
            continue
        args = torch.fx.node.map_arg(node.args, lambda n: Ref(n.name))
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: Ref(n.name))
        values = value if isinstance(value, (tuple, list)) else [value]
        results = [tuple(v.shape) for v in values]
        pointwise = torch.Tag.pointwise in node.target.tags
        rule = rule_for(str(node.target), args, kwargs, shapes.__getitem__, results, pointwise)
        yield str(node.target), rule


@pytest.mark.sampled(7)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_every_operator_has_a_rule(name: str, training: bool) -> None:
    model_name, config_name, settings, inputs = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**settings)).train(training)
    found = list(calls(model, inputs))
    without = Counter(target for target, rule in found if rule is None)
    uncut = Counter(t for t, r in found if r and not any(r.can_cut(a) and n > 1 for a, n in r.extents.items()))
    print(f"\n{name}: {len(found)} operators, without rule {dict(without)}, with nothing to cut {dict(uncut)}")
    assert set(without) <= WITHOUT_RULE
    assert len(found) > 20


NOTHING_TO_CUT = {
    "arange": ("gpt2", "its values tell their position; it is made on every device that reads it"),
    "tril_indices": ("dlrm", "likewise"),
    "ones": ("gpt2", "one number"),
    "cumsum": ("mixtral", "of a vector: every sum needs all before it"),
    "sort": ("mixtral", "of a vector"),
    "index_put": ("mixtral", "into a vector that is written to at any place"),
    "scatter_add": ("mixtral", "likewise"),
    "embedding_bag": ("dlrm", "it has no rule: its bags are no axis"),
    "add": ("resnet", "one number, as are all below"),
    "mul": ("mixtral", ""),
    "div": ("clip", ""),
    "exp": ("clip", ""),
    "clone": ("t5", ""),
}
"""Operators of the zoo, by name, of which some call has no axis to cut: a model that has such a call, and why."""


@pytest.mark.slow
@pytest.mark.parametrize("model", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ZOO])
def test_what_the_zoo_cannot_cut(model: str) -> None:
    """On the traces of test_models, which that file's tests of the same model make in the same process."""
    found = set()
    for op in prepared(model, "train")[1].graph.operators:
        name = op.target.split(".")[1]
        if op.rule is None or not op.rule.cuttable:
            found.add(name)
            one = all(value.num_elements == 1 for value in op.results)
            assert one or NOTHING_TO_CUT.get(name, ("", ""))[1], f"{op}: {op.rule}"
    assert found <= NOTHING_TO_CUT.keys()
    assert found >= {name for name, (seen_in, _) in NOTHING_TO_CUT.items() if seen_in == model}


def test_axes_that_stay_whole() -> None:
    softmax = make("aten.softmax.int", {"x": (2, 3, 5)}, [(2, 3, 5)], -1)
    assert softmax.cuttable == ("d0", "d1") and "d2" in softmax.whole
    layer_norm = make("aten.layer_norm.default", {"x": (2, 3, 5)}, [(2, 3, 5)], [5])
    assert layer_norm.cuttable == ("b0", "b1")
    counted = make("aten.avg_pool1d.default", {"x": (2, 3, 9)}, [(2, 3, 5)], [3], [2], [1], False, False)
    assert counted.cuttable == ("b0", "b1")
    drawn = make(
        "aten.scaled_dot_product_attention.default", dict.fromkeys("qkv", (2, 4, 5, 8)), [(2, 4, 5, 8)], None, 0.1, True
    )
    assert "l" not in drawn.cuttable


def make(target: str, shapes: dict[str, tuple[int, ...]], results: list[tuple[int, ...]], *more: Any) -> AxisRule:
    args = (*map(Ref, shapes), *more)
    rule = rule_for(target, args, {}, shapes.__getitem__, results, target.startswith(("aten.add", "aten.mul")))
    assert rule is not None
    return rule


def test_linear_reads_as_written() -> None:
    rule = make("aten.linear.default", {"x": (2, 3, 4), "w": (5, 4)}, [(2, 3, 5)])
    assert str(rule) == "b0 b1 k, n k -> b0 b1 n"
    assert rule.sums == {"k"} and not rule.whole


LINEAR = [
    ("aten.add.Tensor", [(2, 3), (3,)], [(2, 3)], (), ((0, 1),)),
    ("aten.add.Tensor", [(2, 3)], [(2, 3)], (1.0,), ()),
    ("aten.mul.Tensor", [(2, 3), (3,)], [(2, 3)], (), ((0,), (1,))),
    ("aten.mul.Tensor", [(2, 3)], [(2, 3)], (1.0,), ((0,),)),
    ("aten.div.Tensor", [(2, 3), (3,)], [(2, 3)], (), ((0,),)),
    ("aten.linear.default", [(2, 3), (4, 3)], [(2, 4)], (), ((0,), (1,))),
    ("aten.linear.default", [(2, 3), (4, 3), (4,)], [(2, 4)], (), ((0, 2), (1, 2))),
    ("aten.addmm.default", [(4,), (2, 3), (3, 4)], [(2, 4)], (), ((0, 1), (0, 2))),
    ("aten.conv2d.default", [(1, 2, 5, 5), (3, 2, 3, 3)], [(1, 3, 3, 3)], (), ((0,), (1,))),
    ("aten.sum.default", [(2, 3)], [()], (), ((0,),)),
    ("aten.view.default", [(2, 3)], [(6,)], ([6],), ((0,),)),
    ("aten.slice.Tensor", [(2, 3)], [(1, 3)], (0, 1, 2), ((0,),)),
    ("aten.gelu.default", [(2, 3)], [(2, 3)], (), None),
    ("aten.clone.default", [(2, 3)], [(2, 3)], (), ((0,),)),
    ("aten._to_copy.default", [(2, 3)], [(2, 3)], (), ()),
]


@pytest.mark.parametrize(("target", "shapes", "results", "more", "linear"), LINEAR)
def test_linear_groups(target: str, shapes: Any, results: Any, more: Any, linear: Any) -> None:
    named = {f"t{i}": s for i, s in enumerate(shapes)}
    args = (*map(Ref, named), *more)
    rule = rule_for(target, args, {}, named.__getitem__, results, pointwise=target == "aten.gelu.default")
    assert rule is not None
    assert rule.linear == (linear or ())


def test_cat_is_jointly_linear_and_reads_a_list() -> None:
    shapes = {"a": (2, 3), "b": (4, 3)}
    rule = rule_for("aten.cat.default", ([Ref("a"), Ref("b")],), {}, shapes.__getitem__, [(6, 3)], False)
    assert rule is not None and rule.linear == ((0, 1),)
    assert str(rule) == "[d0] d1, [d0-2] d1 -> d0 d1" and sorted(rule.cuttable) == ["d0", "d1"]


def test_sparse_embeddings_keep_their_vocabulary() -> None:
    dense = make("aten.embedding.default", {"w": (11, 5), "i": (2,)}, [(2, 5)], -1, False, False)
    sparse = make("aten.embedding.default", {"w": (11, 5), "i": (2,)}, [(2, 5)], -1, False, True)
    assert dense.sums == {"v"} and not sparse.sums and "v" not in sparse.cuttable


def test_keyword_operands_keep_their_order() -> None:
    shapes = {"x": (2, 3), "w": (4, 3), "c": (4,)}
    kwargs = {"bias": Ref("c"), "weight": Ref("w")}
    rule = rule_for("aten.linear.default", (Ref("x"),), kwargs, shapes.__getitem__, [(2, 4)], False)
    assert rule is not None
    assert rule.operands == ((("b0",), ("k",)), (("n",),), (("n",), ("k",)))


def test_size_arguments_are_named() -> None:
    assert make("aten.view.default", {"x": (6,)}, [(2, 3)], [2, 3]).shape_argument == 1
    assert make("aten.expand.default", {"x": (1, 3)}, [(2, 3)], [2, 3]).shape_argument == 1
    assert make("aten.new_zeros.default", {"x": (1, 3)}, [(2, 3)], [2, 3]).shape_argument == 1
    assert make("aten.zeros.default", {}, [(2, 3)], [2, 3]).shape_argument == 0


def test_reasons_are_given() -> None:
    assert "depends on the data" in reason_without_rule("aten.nonzero.default")
    assert "mine" in reason_without_rule("mine.operator.default")
    assert "aten.unheard_of" in reason_without_rule("aten.unheard_of.default")


def test_notation_names_operator_and_axis_at_fault() -> None:
    shapes = {"x": (2, 3), "w": (5, 4)}
    call = Call("aten.linear.default", ("input", "weight"), (Ref("x"), Ref("w")), {}, shapes.__getitem__, ((2, 5),))
    with pytest.raises(GraphError, match=r"aten\.linear\.default.*'w'.*axis 'k'"):
        bind(call, "... k, n k -> ... n")
    with pytest.raises(GraphError, match="2 dimensions, its axis rule 3"):
        bind(call, "a b k, n k -> ... n")


@pytest.mark.parametrize("text", ["a b", "a (b -> a", "a b) -> a", "... a ... -> a"])
def test_notation_refuses_nonsense(text: str) -> None:
    with pytest.raises(GraphError, match="axis notation"):
        parse(text)


def test_factors_are_common_to_both_shapes() -> None:
    found = factor((6, 4), (3, 8))
    assert found.source == (("d0", "d1"), ("d2",)) and found.target == (("d0",), ("d1", "d2"))
    assert dict(found.extents) == {"d0": 3, "d1": 2, "d2": 4} and not found.whole
    with pytest.raises(GraphError, match="equally many"):
        factor((2,), (3,))


def test_every_row_names_a_real_operator() -> None:
    unknown = [key for key in FAMILIES if "." not in key and not hasattr(torch.ops.aten, key)]
    assert not unknown


def count(target: str, shapes: list[tuple[int, ...]], result: tuple[int, ...], *wants: bool, **more: Any) -> Any:
    named = {f"t{i}": s for i, s in enumerate(shapes)}
    rule = rule_for(target, tuple(map(Ref, named)), more, named.__getitem__, [result], False)
    return flops(target, rule, shapes, [result], wants)


def test_flops_of_products() -> None:
    assert count("aten.linear.default", [(2, 3, 7), (5, 7)], (2, 3, 5), True, True) == (420, 840)
    assert count("aten.linear.default", [(2, 7), (5, 7), (5,)], (2, 5), False, True, True) == (140, 150)
    assert count("aten.addmm.default", [(5,), (3, 7), (7, 5)], (3, 5)) == (210, 0)
    assert count("aten.bmm.default", [(2, 3, 7), (2, 7, 5)], (2, 3, 5), True) == (420, 420)
    assert count("aten.conv2d.default", [(2, 3, 7, 8), (5, 3, 3, 2)], (2, 5, 5, 7))[0] == 2 * 2 * 5 * 35 * 18
    assert count("aten.conv2d.default", [(2, 6, 7, 8), (6, 1, 3, 2)], (2, 6, 5, 7), groups=6)[0] == 2 * 2 * 6 * 35 * 6


def test_flops_of_attention() -> None:
    shapes = [(2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)]
    forward, backward = count("aten.scaled_dot_product_attention.default", shapes, (2, 4, 3, 8), True, True, True)
    assert forward == 4 * 2 * 4 * 3 * 5 * 8 and backward == 2.5 * forward


def test_flops_of_the_rest() -> None:
    assert flops("aten.gelu.default", None, [(2, 3)], [(2, 3)], [True]) == (6, 6)
    assert flops("aten.view.default", None, [(2, 3)], [(6,)], [True]) == (0, 0)
    assert flops("aten.layer_norm.default", None, [(2, 3), (3,)], [(2, 3)]) == (30, 0)


def test_flops_agree_with_torch_where_it_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.randn(2, 6, 9, 9), torch.randn(6, 4, 3, 3)
    with FlopCounterMode(display=False) as counter:
        y = torch.ops.aten.convolution.default(x, w, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1)
    args = (Ref("x"), Ref("w"), None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1)
    rule = rule_for("aten.convolution.default", args, {}, {"x": x.shape, "w": w.shape}.__getitem__, [y.shape], False)
    assert flops("aten.convolution.default", rule, [x.shape, w.shape], [y.shape])[0] == counter.get_total_flops()


def test_rules_are_quick() -> None:
    shapes = {"x": (8, 1024, 4096), "w": (4096, 4096), "y": (8, 1024, 4096)}
    every = [
        ("aten.linear.default", (Ref("x"), Ref("w")), (8, 1024, 4096), False),
        ("aten.add.Tensor", (Ref("x"), Ref("y")), (8, 1024, 4096), True),
        ("aten.view.default", (Ref("x"), [8, 1024, 32, 128]), (8, 1024, 32, 128), False),
    ]

    def once() -> float:
        start = time.perf_counter()
        for target, args, result, pointwise in every * 50:
            rule_for(target, args, {}, shapes.__getitem__, [result], pointwise)
        return (time.perf_counter() - start) / (50 * len(every))

    assert min(once() for _ in range(5)) < 0.3e-3
