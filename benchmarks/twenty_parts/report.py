"""The page of what came of all models."""

from __future__ import annotations

from collections.abc import Mapping

from twenty_parts.training import MODES, TOLERANCE, Compared

HEADER = f"""# Twenty steps

`python benchmarks/twenty_steps.py` trains small models of random weights for twenty steps of SGD or AdamW, on one
device and on three workers, in float32: by `layer`, `hybrid` and `feature` with `loss.backward()` and
`optimizer.step()`, and by `layer` and `hybrid` with `train_step` (fused). *Loss* is the largest relative difference of
a step's loss, *state* that of a parameter or buffer after the last step; both may be {TOLERANCE:g}. *Planned* is the
share of the FLOPs of a forward in planned graphs, or of the parameters that graphs read if that is less; the rest ran
in islands, or in the Python between them. What is empty has not been run.
"""


def page(found: Mapping[tuple[str, str], Compared], date: str) -> str:
    """The whole page."""
    names = list(dict.fromkeys(name for name, _ in found))
    lines = [HEADER, f"Last run: {date}.", "", f"| model | {' | '.join(MODES)} | loss | state | planned |"]
    lines += ["|---" * (len(MODES) + 4) + "|"]
    for name in names:
        modes = {mode: found[name, mode] for mode in MODES if (name, mode) in found}
        states = [modes[mode].status if mode in modes else "" for mode in MODES]
        loss = max(x.loss_difference for x in modes.values())
        state = max(x.state_difference for x in modes.values())
        share = min(x.share for x in modes.values())
        lines.append(f"| {name} | {' | '.join(states)} | {loss:.0e} | {state:.0e} | {100 * share:.0f} % |")
    not_equal = [(name, mode, x) for (name, mode), x in found.items() if x.status != "equal"]
    if not_equal:
        lines += ["", *(f"- {name}, {mode}: {x.status}: {x.reason}" for name, mode, x in not_equal)]
    return "\n".join(lines) + "\n"
