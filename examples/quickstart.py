"""Train a small GPT-2 split over two CPU workers, and the same model on one device as the control.

The text is Python's own documentation, which the standard library ships; a byte is a token. Both runs start from the
same seed and see the same batches, so their losses have to agree::

    python examples/quickstart.py
    python examples/quickstart.py --devices 3 --microbatches 6 --steps 20
    python examples/quickstart.py --devices cuda:0,cuda:1
    python examples/quickstart.py --schedule 1f1b
    python examples/quickstart.py --schedule async --steps 200

With ``--schedule`` the split run makes fused steps (``parted.train_step``). An asynchronous schedule updates weights
while microbatches are under way, so that its losses are not those of one device, but as good after some steps.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import graphpart as gp
from graphpart.errors import DrawError

CONTEXT = 128
VOCABULARY = 256


@dataclass(frozen=True)
class Run:
    """What one training run gave.

    Attributes:
        losses: per step.
        time_s: of all steps but the first, which also traces and plans.
    """

    losses: list[float]
    time_s: float


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(options.seed)
    text = read_text()
    model = build_model(options)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    parted = gp.partition(
        model,
        options.devices,
        strategy=options.strategy,
        num_microbatches=options.microbatches,
        schedule=options.schedule,
    )
    # Each worker gets its share of the cores, and so does the control: one device of the same kind.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(parted.cluster)))
    first = next(batches(text, options))
    plan = parted.prepare(input_ids=first, labels=first, use_cache=False)
    print(f"\n{plan.explain()}\n")
    try:
        print(f"The picture is in {plan.draw(options.out / 'plan.svg')}")
    except DrawError as error:
        print(f"No picture: {error}")
    print(f"The plan is in {plan.save(options.out / 'plan.json')}\n")

    names = [device.name for device in parted.cluster.devices]
    home = "cpu" if names[0].startswith("cpu") else names[0]
    split = train(parted, text, options, home, f"on {', '.join(names)}")
    if options.control:
        model = build_model(options)
        model.load_state_dict(start)
        control = train(model.to(home), text, options, home, "on one device")
        compare(split, control, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="training steps (default: %(default)s)")
    parser.add_argument("--devices", type=devices, default=["cpu:0", "cpu:1"], help="a number, or names: cuda:0,cuda:1")
    parser.add_argument("--microbatches", type=int, default=4, help="parts of the batch (default: %(default)s)")
    parser.add_argument(
        "--strategy", default="layer", help="how to split: layer, single or auto (default: %(default)s)"
    )
    parser.add_argument("--schedule", help="of fused steps: gpipe, 1f1b, zero-bubble, …, auto or async")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="transformer blocks (default: %(default)s)")
    parser.add_argument("--width", type=int, default=160, help="width, a multiple of 32 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for plan.svg and plan.json (default: here)")
    parser.add_argument(
        "--control", action=argparse.BooleanOptionalAction, default=True, help="also train on one device"
    )
    return parser.parse_args()


def devices(text: str) -> int | list[str]:
    return int(text) if text.isdigit() else text.split(",")


def read_text() -> torch.Tensor:
    """Python's documentation as bytes, ``[bytes]``."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def build_model(options: argparse.Namespace) -> GPT2LMHeadModel:
    # Dropout is off, so that both runs can be compared step by step.
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_layer=options.layers,
        n_embd=options.width,
        n_head=options.width // 32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


def batches(text: torch.Tensor, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Random pieces of the text, ``[batch, CONTEXT]``; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        starts = torch.randint(len(text) - CONTEXT, (options.batch,), generator=generator)
        yield torch.stack([text[start : start + CONTEXT] for start in starts.tolist()])


def train(model: torch.nn.Module, text: torch.Tensor, options: argparse.Namespace, home: str, where: str) -> Run:
    """An ordinary training loop: it does not know whether the model is split."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses: list[float] = []
    stream = batches(text, options)
    begin = time.perf_counter()
    with tqdm(range(options.steps), desc=f"Training {where}", unit="step") as bar:
        for step in bar:
            batch = next(stream).to(home)
            losses.append(step_of(model, optimizer, batch, options.schedule))
            if step == 0:
                begin = time.perf_counter()
            else:
                rate = step * batch.numel() / (time.perf_counter() - begin)
                bar.set_postfix_str(f"loss {losses[-1]:.4f}, {rate:,.0f} tokens/s")
    return Run(losses, time.perf_counter() - begin)


def step_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor, schedule: str | None
) -> float:
    """One step on one batch; returns its loss. An asynchronous step cannot clip: it has no point with all gradients."""
    clip = None if schedule == "async" else 1.0
    arguments = {"input_ids": batch, "labels": batch, "use_cache": False}
    if schedule is not None and isinstance(model, gp.PartitionedModule):
        return model.train_step(**arguments, optimizer=optimizer, clip_grad_norm=clip).loss.item()
    loss = model(**arguments).loss
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


def compare(split: Run, control: Run, options: argparse.Namespace) -> None:
    differences = [abs(a - b) for a, b in zip(split.losses, control.losses, strict=True)]
    worst = max(range(len(differences)), key=differences.__getitem__)
    print(f"\nAfter {options.steps} steps")
    print(f"  loss split over devices: {split.losses[-1]:.6f}  (from {split.losses[0]:.6f})")
    print(f"  loss on one device:      {control.losses[-1]:.6f}  (from {control.losses[0]:.6f})")
    print(f"  difference at the end:   {differences[-1]:.2e}")
    print(f"  largest of any step:     {differences[worst]:.2e}  (step {worst + 1})")
    if options.steps > 1:
        print(f"  time of the split run:   {split.time_s / control.time_s:.2f} × the time on one device")


if __name__ == "__main__":
    main()
