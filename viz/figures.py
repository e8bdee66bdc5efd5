"""The plans that the gallery draws, and what there is to say about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import neurons
import torch
import unrolled
from small_models import MLP, Convolutions, Fork, LocallyConnected, SparseMLP, StackedLSTM
from transformers import GPT2Config, GPT2LMHeadModel

import graphpart as gp
from graphpart.draw.picture.program_dot import program_dot

Drawing = Callable[[gp.Plan, str], str]


@dataclass(frozen=True)
class Figure:
    """One picture.

    Attributes:
        name: of its file, without suffix.
        heading: in the README.
        title: in the picture.
        plan: makes the plan.
        draw: from plan and title to text, SVG if it is drawn by itself and DOT if Graphviz draws it.
        words: what it shows, and which system did it.
    """

    name: str
    heading: str
    title: str
    plan: Callable[[], gp.Plan]
    draw: Drawing
    words: str

    @property
    def is_dot(self) -> bool:
        """Whether Graphviz draws it."""
        return self.draw in (folded, detailed, before)


def folded(plan: gp.Plan, title: str) -> str:
    """DOT source: modules as boxes, with a cell a tile."""
    return plan.dot(bridges=False, title=title)


def detailed(plan: gp.Plan, title: str) -> str:
    """DOT source: a frame a device, with every bridge."""
    return plan.dot(bridges=True, title=title)


def before(plan: gp.Plan, title: str) -> str:
    """DOT source: a frame a device, before sends and receives are put in."""
    return program_dot(plan.graph, plan.placement, plan.cluster, plan.program, title=title, messages=False)


def layer() -> gp.Plan:
    """Each layer on a device of its own."""
    model = MLP(6, 6, 6, 6, 6)
    x = torch.zeros(1, 6)
    return gp.plan(model, 4, (x,), strategy={"fc1": 0, "fc2": 1, "fc3": 2, "fc4": 3})


def feature() -> gp.Plan:
    """Each layer's neurons cut over all devices."""
    model = MLP(6, 9, 9, 6)
    x = torch.zeros(1, 6)
    return gp.plan(model, 3, (x,), strategy={"fc*": gp.split("n", [0, 1, 2])})


def hybrid() -> gp.Plan:
    """Two groups of layers, each cut over two devices of its own."""
    model = MLP(6, 8, 8, 8, 6)
    x = torch.zeros(1, 6)
    cut = {"fc[12]": gp.split("n", [0, 1]), "fc[34]": gp.split("n", [2, 3])}
    return gp.plan(model, 4, (x,), strategy=cut)


def local() -> gp.Plan:
    """A locally connected network cut into quarters: by layer and by position."""
    model = LocallyConnected(5)
    x = torch.zeros(1, 1, 12)
    cut = {"local[123]": gp.split(2, [0, 1]), "local[45]": gp.split(2, [2, 3])}
    return gp.plan(model, 4, (x,), strategy=cut)


def anywhere() -> gp.Plan:
    """Groups of neurons, of any sizes, on any devices."""
    model = MLP(6, 9, 9, 6)
    x = torch.zeros(1, 6)
    cut = {
        "fc1": gp.split("n", {0: [0, 1, 4, 7], 1: [2, 8], 2: [3, 5, 6]}),
        "fc2": gp.split("n", {0: [5], 1: [0, 2, 3, 6, 7, 8], 2: [1, 4]}),
        "fc3": gp.split("n", {1: [0, 2, 5], 2: [1, 3, 4]}),
    }
    return gp.plan(model, 3, (x,), strategy=cut)


def free() -> gp.Plan:
    """Groups of neurons that the strategy finds in masked layers."""
    model = SparseMLP(num_layers=4, width=12, num_blocks=3, between=3)
    x = torch.zeros(1, 12)
    return gp.plan(model, 3, (x,), strategy="free")


def free_edges(plan: gp.Plan, title: str) -> str:
    """SVG text of :func:`free`, with the edges that the masks leave."""
    model = SparseMLP(num_layers=4, width=12, num_blocks=3, between=3)  # the same: nothing is random about its masks
    masks = {name.removesuffix(".weight_mask"): mask.tolist() for name, mask in model.named_buffers()}
    return neurons.draw(plan, title, masks)


def lstm() -> gp.Plan:
    """Embedding, two LSTM layers and decoder on a device each."""
    model = StackedLSTM(num_layers=2)
    words = torch.zeros(8, 5, dtype=torch.long)
    return gp.plan(model, 4, (words,), strategy={"embedding": 0, "lstm.0": 1, "lstm.1": 2, "decoder": 3})


def fork() -> gp.Plan:
    """One operator on the first device, its two readers on the second."""
    model = Fork()
    x = torch.zeros(4, 8)
    return gp.plan(model, 2, (x,), strategy={"a": 0, "b": 1, "c": 1})


def column_row() -> gp.Plan:
    """Pairs of linear layers, the first cut by what it makes and the second by what it reads."""
    model = MLP(64, 256, 64, 256, 64)
    x = torch.zeros(16, 64)
    columns, rows = gp.split("n", [0, 1]), gp.split("k", [0, 1])
    return gp.plan(model, 2, (x,), strategy={"fc1": columns, "fc2": rows, "fc3": columns, "fc4": rows})


def one_weird_trick() -> gp.Plan:
    """Convolutions cut by samples, the classifier by features."""
    model = Convolutions()
    images = torch.zeros(32, 3, 32, 32)
    cut = {
        "features.*": gp.split(0, [0, 1]),
        "classifier.0": gp.split("n", [0, 1]),
        "classifier.2": gp.split("k", [0, 1]),
    }
    return gp.plan(model, 2, (images,), strategy=cut)


def gpt2_by_feature() -> gp.Plan:
    """Two blocks of GPT-2, cut by features over two devices; on the meta device."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=2))
        ids = torch.zeros(8, 1024, dtype=torch.long)
    model.loss_type = "ForCausalLM"
    arguments = {"input_ids": ids, "labels": ids, "use_cache": False}
    return gp.plan(model, "2xH100", kwargs=arguments, strategy="feature")


def gpt2() -> gp.Plan:
    """GPT-2 small cut by layers over two devices, in four microbatches; on the meta device."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
        ids = torch.zeros(8, 1024, dtype=torch.long)
    model.loss_type = "ForCausalLM"
    arguments = {"input_ids": ids, "labels": ids, "use_cache": False}
    return gp.plan(model, "2xH100", kwargs=arguments, strategy="layer", num_microbatches=4)


FIGURES = (
    Figure(
        "layer",
        "Layers",
        "Layer partitioning",
        layer,
        neurons.draw,
        """\
The survey's Fig. 2: a chain of fully connected layers, each on its own worker. All of a layer's values go to the next
worker, in one message. MXNet, SINGA and TensorFlow let the user place layers so.""",
    ),
    Figure(
        "feature",
        "Features",
        "Feature partitioning",
        feature,
        neurons.draw,
        """\
The survey's Fig. 3: the neurons of every layer are cut over all workers. Each worker needs all values of the layer
before, so every value goes to every other worker: an all-gather between two layers. SINGA cuts layers along
dimension 1 in this way.""",
    ),
    Figure(
        "hybrid",
        "Hybrid",
        "Hybrid partitioning",
        hybrid,
        neurons.draw,
        """\
The survey's Fig. 4: groups of layers, and in each a cut by features, on 2 × 2 workers. Values cross to the workers of
the next group, each once a worker however many neurons read it there.""",
    ),
    Figure(
        "local",
        "DistBelief's cut",
        "A locally connected network on four machines",
        local,
        neurons.draw,
        """\
The survey's Fig. 6, after J. Dean et al. (“Large Scale Distributed Deep Networks”, 2012): each neuron reads three
neighbours, and the network is cut into quarters. Only values with an edge across a boundary are sent: one a layer and
direction between the upper and the lower half. (The layers here are convolutions, whose weights all positions share;
those few bytes cross, too.)""",
    ),
    Figure(
        "free",
        "Neuron groups",
        "Neuron groups found in a sparse network",
        free,
        free_edges,
        """\
Where masks make a network sparse, `free` looks for groups of neurons with few edges between them; DistBelief leaves
that to the user. The neurons of a group lie scattered over their layers (the numbers are their indices), and only
values with an edge across are sent.""",
    ),
    Figure(
        "anywhere",
        "Any neuron anywhere",
        "Groups of neurons on any devices",
        anywhere,
        neurons.draw,
        """\
DistBelief's users assign any node of the network to any machine. Here each layer's neurons are given out by index, in
groups of different sizes. A neuron's value crosses to each other device once, however many edges lead there.""",
    ),
    Figure(
        "lstm",
        "Multi-layer LSTM",
        "LSTM layers on different devices, unrolled over time",
        lstm,
        unrolled.draw,
        """\
The survey's Figs. 7 and 11: MXNet's model-parallel LSTM, with the embedding on the first device and the decoder on the
last. The numbers say in which round a cell could run at the earliest: layer 1 at step t + 1 with layer 2 at step t.
Operators of one device between two bridges run as one segment, though, so today devices overlap by microbatches and
not by time steps.""",
    ),
    Figure(
        "fork_before",
        "TensorFlow's send and recv: before",
        "Before: edges that cross devices",
        fork,
        before,
        """\
The left half of the survey's Fig. 10, after M. Abadi et al. (“TensorFlow: Large-Scale Machine Learning on Heterogeneous
Distributed Systems”, 2016): two operators on the second device read what the first device makes.""",
    ),
    Figure(
        "fork",
        "TensorFlow's send and recv: after",
        "After: one send and one recv",
        fork,
        detailed,
        """\
The right half: a send and a recv that share one key (here the message's number). Both readers use the one recv, so the
value crosses once.""",
    ),
    Figure(
        "column_row",
        "Columns, then rows",
        "Pairs of linear layers, cut by columns and then by rows",
        column_row,
        detailed,
        """\
M. Shoeybi et al. (“Megatron-LM”, 2019): the first layer of a pair is cut along its outputs (n), the second along its
inputs (k). Nothing is sent within a pair; the partial sums (Σ) of the second layer are added in one all-reduce, and at
the end where the output is wanted.""",
    ),
    Figure(
        "gpt2_feature",
        "GPT-2 by features",
        "GPT-2, two blocks, cut by features",
        gpt2_by_feature,
        folded,
        """\
The strategy finds such pairs in every block of GPT-2: attention by heads (three runs of the fused projection a device)
and the MLP by columns and rows, each with one all-reduce. Embedding, head and loss are cut by vocabulary. Only the
returned logits are brought together; the loss does without them.""",
    ),
    Figure(
        "one_weird_trick",
        "Samples here, features there",
        "Convolutions by samples, classifier by features",
        one_weird_trick,
        folded,
        """\
A. Krizhevsky (“One weird trick for parallelizing convolutional neural networks”, 2014): convolutions hold few weights
and work much, so their batch is cut; the classifier holds most weights, so its features are cut. Between them the
activations change hands once.""",
    ),
    Figure(
        "gpt2",
        "GPT-2 by layers",
        "",
        gpt2,
        folded,
        """\
The picture at the top of the project's README: two stages, four microbatches, and the tied embedding, which crosses
once a step.""",
    ),
)
"""Every picture, in the README's order."""
