"""Pictures and tables of plans, on synthetic graphs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import graphviz
import pytest

from graphpart.draw.picture.dot import plan_dot
from graphpart.draw.picture.fold import fold
from graphpart.draw.picture.render import render
from graphpart.draw.picture.wiring import spans
from graphpart.draw.words.modules import compress, module_ranges
from graphpart.draw.words.share import crossings, device_flops, device_parameter_bytes, operator_devices
from graphpart.draw.words.table import explain
from graphpart.draw.words.text import display_width, escape_html, quote, shorten, table
from graphpart.errors import DrawError
from graphpart.ir.axes import AxisRule
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.graph import Graph, Operator, Ref, Source, SourceLine, Value
from graphpart.ir.placement import Placement, Shard, Tile
from graphpart.ir.program import Bridge, Program, Wire
from graphpart.ir.quantities import format_bytes, format_flops, format_time
from graphpart.ir.region import Intervals, Region
from graphpart.ir.timeline import Event, Timeline
from tests.helpers.pipelines import unchecked


def cluster(num_devices: int = 2) -> Cluster:
    return Cluster(
        tuple(Device(f"cuda:{i}", "H100-SXM", {"float32": 6e13}, 80 * 10**9, 3.35e12) for i in range(num_devices)),
        Link(1e-5, 4.5e11),
    )


class Builder:
    """Adds operators one by one; everything is one chain unless operands say otherwise."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.operators: list[Operator] = []

    def source(self, name: str, shape: tuple[int, ...], kind: str = "parameter", dtype: str = "float32") -> str:
        value = Value(name, shape, dtype, kind == "parameter")
        self.sources.append(Source(value, kind, (name,), kind == "parameter"))
        return name

    def op(self, target: str, *operands: str, shape: tuple[int, ...], path: str = "", flops: float = 0.0) -> str:
        name = f"{target}_{len(self.operators)}"
        self.operators.append(
            Operator(
                name,
                f"aten.{target}.default",
                tuple(Ref(o) for o in operands),
                results=(Value(name, shape, "float32", True),),
                flops_forward=flops,
                flops_backward=2 * flops,
                module_path=path,
                source_line=SourceLine("model.py", 10 + len(self.operators), f"{target}(…)"),
            )
        )
        return name

    def graph(self, name: str, *outputs: str) -> Graph:
        return Graph(name, tuple(self.sources), tuple(self.operators), tuple(Ref(o) for o in outputs))


def gpt2(num_blocks: int = 12, width: int = 768, seq: int = 128, batch: int = 4, vocab: int = 50257) -> Graph:
    """About 25 operators a block, with module paths as in the original, and a tied embedding."""
    b = Builder()
    s = (batch, seq, width)
    tokens = batch * seq
    b.source("input_ids", (batch, seq), "input", "int64")
    wte, wpe = b.source("wte", (vocab, width)), b.source("wpe", (1024, width))
    positions = b.op("arange", shape=(1, seq), path="transformer")
    x = b.op("embedding", wte, "input_ids", shape=s, path="transformer.wte")
    p = b.op("embedding", wpe, positions, shape=(1, seq, width), path="transformer.wpe")
    mask = b.op("full", shape=(seq, seq), path="transformer")
    mask = b.op("tril", mask, shape=(seq, seq), path="transformer")
    x = b.op("add", x, p, shape=s, path="transformer")
    x = b.op("dropout", x, shape=s, path="transformer.drop")
    for i in range(num_blocks):
        x = block(b, x, mask, f"transformer.h.{i}", s, tokens)
    x = b.op("layer_norm", x, b.source("ln_f", (width,)), shape=s, path="transformer.ln_f")
    x = b.op("linear", x, wte, shape=(batch, seq, vocab), path="lm_head", flops=2 * tokens * width * vocab)
    return b.graph("GPT2LMHeadModel", x)


def block(b: Builder, x: str, mask: str, path: str, s: tuple[int, ...], tokens: int) -> str:
    width = s[-1]
    heads = (s[0], 12, s[1], width // 12)

    def linear(x: str, n: int, k: int, where: str) -> str:
        w, c = b.source(f"{where}.weight", (n, k)), b.source(f"{where}.bias", (n,))
        return b.op("linear", x, w, c, shape=(*s[:2], n), path=where, flops=2 * tokens * n * k)

    def norm(x: str, where: str) -> str:
        return b.op("layer_norm", x, b.source(f"{where}.weight", (width,)), shape=s, path=where)

    attn, mlp = f"{path}.attn", f"{path}.mlp"
    h = linear(norm(x, f"{path}.ln_1"), 3 * width, width, f"{attn}.c_attn")
    parts = [b.op("slice", h, shape=s, path=attn) for _ in "qkv"]
    parts = [b.op("view", part, shape=heads, path=attn) for part in parts]
    q, k, v = (b.op("transpose", part, shape=heads, path=attn) for part in parts)
    h = b.op("scaled_dot_product_attention", q, k, v, mask, shape=heads, path=attn, flops=4 * tokens * s[1] * width)
    h = b.op("view", b.op("transpose", h, shape=s, path=attn), shape=s, path=attn)
    h = b.op("dropout", linear(h, width, width, f"{attn}.c_proj"), shape=s, path=f"{attn}.resid_dropout")
    x = b.op("add", x, h, shape=s, path=path)
    h = linear(norm(x, f"{path}.ln_2"), 4 * width, width, f"{mlp}.c_fc")
    for name in ("pow", "mul", "tanh"):
        h = b.op(name, h, shape=(*s[:2], 4 * width), path=f"{mlp}.act")
    h = b.op("dropout", linear(h, width, 4 * width, f"{mlp}.c_proj"), shape=s, path=f"{mlp}.dropout")
    return b.op("add", x, h, shape=s, path=path)


def branches() -> Graph:
    """Three branches of convolutions over one image, concatenated and classified."""
    b = Builder()
    x = b.source("image", (8, 3, 64, 64), "input")
    shape = (8, 32, 64, 64)
    x = b.op(
        "relu",
        b.op("conv2d", x, b.source("stem.w", (32, 3, 3, 3)), shape=shape, path="stem", flops=1e8),
        shape=shape,
        path="stem",
    )
    ends = []
    for i, name in enumerate(("branch_a", "branch_b", "branch_c")):
        h = x
        for j in range(i + 1):
            w = b.source(f"{name}.{j}.w", (32, 32, 3, 3))
            h = b.op("conv2d", h, w, shape=shape, path=f"{name}.{j}.conv", flops=6e8)
            h = b.op("batch_norm", h, b.source(f"{name}.{j}.bn", (32,)), shape=shape, path=f"{name}.{j}.bn")
            h = b.op("relu", h, shape=shape, path=f"{name}.{j}")
        ends.append(h)
    x = b.op("cat", *ends, shape=(8, 96, 64, 64))
    x = b.op("mean", x, shape=(8, 96), path="pool")
    x = b.op("linear", x, b.source("fc.w", (10, 96)), shape=(8, 10), path="fc", flops=2 * 8 * 96 * 10)
    return b.graph("ThreeBranches", x)


def flat(num_operators: int = 533) -> Graph:
    """No module paths; a residual addition every seven operators."""
    b = Builder()
    x = b.source("x", (16, 256), "input")
    skip = x
    for i in range(num_operators):
        if i % 7 == 6:
            x = skip = b.op("add", x, skip, shape=(16, 256))
        elif i % 7 == 0:
            x = b.op("linear", x, b.source(f"w{i}", (256, 256)), shape=(16, 256), flops=2 * 16 * 256 * 256)
        else:
            x = b.op(("relu", "mul", "tanh")[i % 3], x, shape=(16, 256))
    return b.graph("Flat", x)


def halves(graph: Graph, num_devices: int = 2) -> Placement:
    """Equal runs of operators, one a device."""
    n = len(graph.operators)
    return Placement.whole(graph, {op.name: i * num_devices // n for i, op in enumerate(graph.operators)})


def branch_a_device(graph: Graph) -> Placement:
    return Placement.whole(
        graph, {op.name: {"branch_b": 1, "branch_c": 2}.get(op.module_path[:8], 0) for op in graph.operators}
    )


def alternating(graph: Graph) -> Placement:
    return Placement.whole(graph, {op.name: i % 2 for i, op in enumerate(graph.operators)})


def weird() -> Graph:
    """Names that would break careless quoting."""
    b = Builder()
    nasty = [
        'say "hi"',
        "a<b>&c",
        "back\\slash\\N",
        "naïve.層.0",
        "new\nline",
        "{|}",
        "<B>",
        "]; evil [",
        "\x00\x07nul",
        "",
    ]
    x = b.source('in "<x>"', (2, 2), "input")
    for i, name in enumerate(nasty):
        x = b.op(f'op<{i}>"\\', x, shape=(2, 2), path=name)
    return b.graph('Net<"&\\>', x)


def tensor_parallel() -> tuple[Graph, Placement]:
    """Linear layers cut over two devices, additions on the first."""
    graph = gpt2(2)
    operators = tuple(
        replace(op, rule=AxisRule({"b": 4, "n": 2}, (("b", "n"),), (("b", "n"),))) if "linear" in op.target else op
        for op in graph.operators
    )
    graph = replace(graph, operators=operators)
    cut = (Tile(0, {"n": Intervals.span(0, 1)}), Tile(1, {"n": Intervals.span(1, 2)}))
    return graph, Placement({op.name: cut if op.rule else (Tile(0),) for op in operators})


def lowered(graph: Graph, placement: Placement, num_microbatches: int = 4) -> Program:
    """As much of a program as a picture reads: wires and bridges of values that change device."""
    devices = operator_devices(graph, placement)
    wires, bridges = [], []
    for name, value in graph.values.items():
        maker = graph.producer.get(name)
        home = devices[maker.name][0] if maker else placement.homes.get(name)
        needs = {devices[u.name][0] for u in graph.consumers[name]}
        if home is None or needs <= {home}:
            continue
        for part in range(num_microbatches) if maker else (None,):
            size = value.size_bytes // (num_microbatches if maker else 1)
            wire = f"{name}@{part}"
            origin = "segment" if maker else "parameter"
            wires.append(
                Wire(
                    wire, name, Region.full(value.shape), value.shape, value.dtype, size, origin, home, part, "s", True
                )
            )
            bridges += [Bridge(wire, home, d, size, len(bridges)) for d in sorted(needs - {home})]
    count = num_microbatches
    empty = Program(graph, 2, count, (1,) * count, (), (), (), (), ())
    return unchecked(empty, wires=tuple(wires), bridges=tuple(bridges))


CASES = {
    "gpt2 on 1": lambda: (gpt2(), halves(gpt2(), 1)),
    "gpt2 on 2": lambda: (gpt2(), halves(gpt2())),
    "gpt2 on 4": lambda: (gpt2(), halves(gpt2(), 4)),
    "48 blocks on 8": lambda: (gpt2(48), halves(gpt2(48), 8)),
    "branches": lambda: (branches(), branch_a_device(branches())),
    "flat": lambda: (flat(), halves(flat())),
    "flat, alternating": lambda: (flat(), alternating(flat())),
    "weird": lambda: (weird(), halves(weird())),
    "tensor parallel": tensor_parallel,
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Graph, Placement]:
    return CASES[request.param]()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("max_boxes", [1, 5, 20, 60])
def test_no_more_boxes_than_asked_for(case: tuple[Graph, Placement], max_boxes: int) -> None:
    assert 1 <= len(fold(*case, max_boxes=max_boxes).boxes) <= max_boxes


def test_every_operator_is_in_one_box(case: tuple[Graph, Placement]) -> None:
    graph, placement = case
    boxes = fold(graph, placement).boxes
    names = [name for box in boxes for name in box.operators]
    assert sorted(names) == sorted(op.name for op in graph.operators)
    assert sum(box.flops for box in boxes) == pytest.approx(graph.flops)
    read = [s for s in graph.parameters if graph.consumers[s.value.name]]
    assert sum(box.parameter_bytes for box in boxes) == sum(s.value.size_bytes for s in read)


def test_boxes_lie_on_the_devices_of_their_operators(case: tuple[Graph, Placement]) -> None:
    graph, placement = case
    devices = operator_devices(graph, placement)
    for box in fold(graph, placement).boxes:
        used = {d for name in box.operators if graph.operator[name].operands for d in devices[name]}
        assert used <= set(box.devices) <= used | {d for name in box.operators for d in devices[name]}


def test_bytes_on_edges_add_up(case: tuple[Graph, Placement]) -> None:
    graph, placement = case
    folded = fold(graph, placement)
    between: dict[tuple[int, int], set[str]] = {}
    for op in graph.operators:
        for name in op.operands:
            if name in graph.producer:
                pair = folded.box_of[graph.producer[name].name], folded.box_of[op.name]
                between.setdefault(pair, set()).add(name)
    expected = {
        pair: sum(graph.values[n].size_bytes for n in names) for pair, names in between.items() if pair[0] != pair[1]
    }
    found = {(e.source, e.destination): e.size_bytes for e in folded.edges if e.kind != "parameter"}
    assert found == expected


@pytest.mark.parametrize("name", ["gpt2 on 1", "gpt2 on 2", "gpt2 on 4", "48 blocks on 8", "branches", "flat"])
def test_boxes_do_not_wait_for_each_other(name: str) -> None:
    folded = fold(*CASES[name]())
    waiting = {i: {e.source for e in folded.edges if e.destination == i and e.kind == "data"} for i in range(60)}
    done: set[int] = set()
    while ready := {i for i, before in waiting.items() if i not in done and before <= done}:
        done |= ready
    assert len(done) == 60


def test_blocks_that_are_alike_fold_and_one_stays_open() -> None:
    graph = gpt2()
    labels = [box.label for box in fold(graph, halves(graph, 1)).boxes]
    assert "h.1–h.11 (×11)" in labels
    assert {"ln_1", "attn", "ln_2", "mlp"} <= set(labels)
    assert sum(box.repeats for box in fold(graph, halves(graph, 1)).boxes if box.repeats > 1) == 11


def test_runs_stop_where_the_device_changes() -> None:
    graph = gpt2()
    device = {}
    for op in graph.operators:
        match = re.match(r"transformer\.h\.(\d+)", op.module_path)
        device[op.name] = int(match[1]) // 6 if match else int(op.module_path in ("transformer.ln_f", "lm_head"))
    folded = fold(graph, Placement.whole(graph, device))
    assert [b.label for b in folded.boxes if b.repeats > 1] == ["h.1–h.5 (×5)", "h.6–h.11 (×6)"]


def test_constants_join_their_consumer() -> None:
    graph = gpt2(2)
    folded = fold(graph, halves(graph))
    full, tril = (op for op in graph.operators if op.target in ("aten.full.default", "aten.tril.default"))
    attention = next(op for op in graph.operators if "attention" in op.target)
    assert folded.box_of[full.name] == folded.box_of[tril.name] == folded.box_of[attention.name]


def test_a_tied_weight_is_an_edge_of_its_own() -> None:
    graph = gpt2()
    folded = fold(graph, halves(graph))
    (edge,) = [e for e in folded.edges if e.kind == "parameter"]
    assert edge.values == ("wte",) and edge.size_bytes == 50257 * 768 * 4
    assert folded.boxes[edge.source].label == "wte" and folded.boxes[edge.destination].label == "lm_head"


def test_fewer_boxes_than_one_are_refused() -> None:
    with pytest.raises(DrawError, match="at least one box"):
        fold(flat(5), halves(flat(5)), max_boxes=0)


def parse(source: str) -> str:
    if shutil.which("dot") is None:
        pytest.skip("Graphviz's dot is not installed")
    done = subprocess.run(["dot", "-Tsvg"], input=source.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert not done.stderr, done.stderr.decode()
    return done.stdout.decode()


def test_dot_draws_it(case: tuple[Graph, Placement]) -> None:
    svg = parse(plan_dot(*case, cluster(8)))
    assert svg.count("<g id=") > len(fold(*case).boxes)


def test_pictures_have_sane_proportions() -> None:
    for name, tallest in (("gpt2 on 1", 1000), ("gpt2 on 2", 1000), ("48 blocks on 8", 1600), ("flat", 1600)):
        size = re.search(r'width="(\d+)pt" height="(\d+)pt"', parse(plan_dot(*CASES[name](), cluster(8))))
        assert size and int(size[1]) < 1000 and int(size[2]) < tallest, name


def test_weird_names_are_shown_as_they_are() -> None:
    graph = weird()
    svg = parse(plan_dot(graph, halves(graph), cluster(), title='T<"&\\N'))
    for text in (
        "T&lt;&quot;&amp;\\N",
        "say &quot;hi&quot;",
        "a&lt;b&gt;&amp;c",
        "back\\slash\\N",
        "層.0",
        "]; evil [",
    ):
        assert text in svg.replace("&#45;", "-").replace("&#160;", " "), text


def test_a_module_cut_over_devices_stays_one_box() -> None:
    graph, placement = tensor_parallel()
    boxes = {box.label: box.devices for box in fold(graph, placement, max_boxes=12).boxes}
    assert boxes["h.0"] == boxes["h.1"] == boxes["lm_head"] == (0, 1) and boxes["ln_f"] == (0,)
    assert ">n 0<" in plan_dot(graph, placement, cluster()) and ">n 1<" in plan_dot(graph, placement, cluster())


def test_messages_of_the_program_are_shown() -> None:
    graph = gpt2()
    placement = halves(graph)
    source = plan_dot(graph, placement, cluster(), lowered(graph, placement))
    assert "4 × 786 kB" in source
    assert "weight, cuda:0 → cuda:1" in source and "dashed" in source
    found = spans(graph, placement, fold(graph, placement), lowered(graph, placement))
    assert sum(s.size_bytes for s in found) == lowered(graph, placement).message_bytes


def test_shares_count_tiles() -> None:
    graph, placement = tensor_parallel()
    first, second = device_flops(graph, placement, 2)
    linear = sum(op.flops_forward + op.flops_backward for op in graph.operators if op.rule)
    assert second == pytest.approx(linear / 2)
    assert first == pytest.approx(graph.flops - linear / 2)


def test_shares_count_parts_of_a_cut_home() -> None:
    graph, placement = tensor_parallel()
    weight = next(s.value for s in graph.parameters if len(s.value.shape) == 2)
    rows, columns = map(Intervals.full, weight.shape)
    third = weight.shape[0] // 3
    parts = tuple(
        Shard(i, Region((part, columns)))
        for i, part in enumerate((Intervals.span(0, third), rows - Intervals.span(0, third)))
    )
    before = device_parameter_bytes(graph, placement, 2)
    cut = replace(placement, shards={weight.name: parts})
    after = device_parameter_bytes(graph, cut, 2)
    row_bytes = weight.size_bytes // weight.shape[0]
    assert after == [before[0] - weight.size_bytes + third * row_bytes, weight.size_bytes - third * row_bytes]
    assert not any(c.value == weight.name for c in crossings(graph, cut))  # each device has a part
    assert fold(graph, cut).boxes and plan_dot(graph, cut, cluster())


@pytest.mark.parametrize("suffix", [".dot", ".gv"])
def test_source_is_written_as_it_is(tmp_path: Path, suffix: str) -> None:
    path = render("digraph { a -> b }", tmp_path / "deep" / f"plan{suffix}")
    assert path.read_text() == "digraph { a -> b }"


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_pictures_are_written(tmp_path: Path, suffix: str, start: bytes) -> None:
    if shutil.which("dot") is None:
        pytest.skip("Graphviz's dot is not installed")
    assert render("digraph { a -> b }", tmp_path / f"plan{suffix}").read_bytes().startswith(start)


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DrawError, match=r"\.bmp.*\.svg, \.png, \.pdf, \.dot, \.gv"):
        render("digraph {}", tmp_path / "plan.bmp")


def test_without_dot_the_source_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: graphviz.Source, **_: object) -> bytes:
        raise graphviz.ExecutableNotFound(["dot"])

    monkeypatch.setattr(graphviz.Source, "pipe", missing)
    with pytest.raises(DrawError, match=r"apt install graphviz.*plan\.dot"):
        render("digraph { a -> b }", tmp_path / "plan.svg")
    assert (tmp_path / "plan.dot").read_text() == "digraph { a -> b }"
    assert not (tmp_path / "plan.svg").exists()


def test_without_the_python_package_the_source_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(DrawError, match=r"pip install graphviz.*plan\.dot"):
        render("digraph { a -> b }", tmp_path / "plan.svg")
    assert (tmp_path / "plan.dot").read_text() == "digraph { a -> b }"


def test_source_that_cannot_be_drawn_is_kept(tmp_path: Path) -> None:
    if shutil.which("dot") is None:
        pytest.skip("Graphviz's dot is not installed")
    with pytest.raises(DrawError, match="could not draw"):
        render("digraph { a -> ", tmp_path / "plan.svg")
    assert (tmp_path / "plan.dot").exists()


def test_numbers_have_units() -> None:
    assert [format_bytes(n) for n in (0, 12, 1500, 1.5e6, 999.6e3, 154389504, 8e10)] == [
        "0 B", "12 B", "1.5 kB", "1.5 MB", "1 MB", "154 MB", "80 GB",
    ]  # fmt: skip
    assert format_flops(3.4e9) == "3.4 GFLOP"
    assert [format_time(t) for t in (0, 1.5, 0.00123, 12.3e-6, 5e-8, 0.9999)] == [
        "0 s", "1.5 s", "1.23 ms", "12.3 µs", "50 ns", "1 s",
    ]  # fmt: skip


def test_tables_are_aligned() -> None:
    text = table(["name", "n"], [["a", 1], ["層層層", 22], ["two\nlines", "3\n444"]], "lr")
    lines = text.split("\n")
    assert len({display_width(line) for line in lines if line[-1].isdigit() or line[-1] == "n"}) == 1
    assert lines[1] == "──────  ───" or set(lines[1]) == {"─", " "}
    assert not any(line.endswith(" ") for line in lines)
    with pytest.raises(ValueError, match="1 cells"):
        table(["a", "b"], [["x"]])


def test_text_is_made_safe() -> None:
    assert escape_html('a<b>&"c') == "a&lt;b&gt;&amp;&quot;c"
    assert quote('a"b\\\nc') == '"a\\"b\\\\ c"'
    assert shorten("x" * 50, 9) == "xxxx…xxxx"


def test_numbered_modules_are_ranges() -> None:
    assert compress(["wte", "h.0", "h.1", "h.2", "h.4", "ln"]) == ["wte", "h.0–2", "h.4", "ln"]
    graph = gpt2()
    devices = operator_devices(graph, halves(graph, 1))
    assert module_ranges(graph, devices, 0) == ["transformer", "lm_head"]
    assert module_ranges(flat(), operator_devices(flat(), halves(flat())), 0) == ["linear_0 … linear_266"]


def explained() -> str:
    graph = replace(gpt2(), sample_dims={"input_ids": 0})
    placement = halves(graph)
    return explain(
        graph,
        placement,
        cluster(),
        lowered(graph, placement),
        {0: SimpleNamespace(total_bytes=3e9)},
        [
            SimpleNamespace(strategy="layer", step_s=0.03, reason="chosen: the fastest that fits"),
            SimpleNamespace(strategy="feature", step_s=None, reason="needs 4 GB more than cuda:0 has; " * 5),
        ],
        Timeline(2, (Event(0, "F", "a", 0.0, 0.012), Event(1, "F", "b", 0.012, 0.03))),
        ["the tied weight wte crosses once a step in both directions, as its readers lie on different devices"],
    )


def test_a_plan_is_explained() -> None:
    text = explained()
    assert text.startswith("GPT2LMHeadModel: 309 operators, 124 M parameters")
    for part in ("transformer.h.6–11", "12 ms", "3 GB", "cuda:0 → cuda:1", "13  158 MB", "Considered", "model.py:11"):
        assert part in text, part


def test_explanations_fit_a_terminal(case: tuple[Graph, Placement]) -> None:
    for text in (explained(), explain(*case, cluster(8))):
        assert max(display_width(line) for line in text.split("\n")) <= 100
        assert not any(line != line.rstrip() for line in text.split("\n"))
