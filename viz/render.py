"""Draw the pictures that the README shows, from real plans: ``make viz``."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import graphpart as gp

HERE = Path(__file__).parent


def gpt2_small() -> gp.Plan:
    """GPT-2 small on two H100s in four microbatches; on the meta device, so that neither is needed."""
    config = GPT2Config()
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
        ids = torch.zeros(8, 1024, dtype=torch.long)
    model.loss_type = "ForCausalLM"
    arguments = {"input_ids": ids, "labels": ids, "use_cache": False}
    return gp.plan(model, "2xH100", kwargs=arguments, strategy="layer", num_microbatches=4)


def main() -> None:
    """Write every picture next to this file, and the plan in words to the terminal."""
    plan = gpt2_small()
    print(plan.explain())
    print(plan.draw(HERE / "gpt2.svg"))


if __name__ == "__main__":
    main()
