"""Draw the pictures of this folder and write its README, from real plans: ``make viz``.

Where Graphviz draws, the DOT source is written, too (folder ``dot``): it is what stays the same from one version of
Graphviz to the next.
"""

from __future__ import annotations

import inspect
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from figures import FIGURES, Figure

import graphpart as gp
from graphpart.draw.picture.render import render
from graphpart.ir.quantities import format_bytes

HERE = Path(__file__).parent

INTRODUCTION = """\
# Gallery

Pictures of real plans: what is drawn is what runs. Most are the figures of a survey of model parallelism in DistBelief,
MXNet, Petuum, SINGA and TensorFlow (2018). `make viz` draws all of them and writes this page; a test holds that it is
up to date. The models are in [small_models.py](small_models.py), the plans in [figures.py](figures.py); `gp` is
`graphpart`.
"""


@cache
def plan_of(figure: Figure) -> gp.Plan:
    """The plan that a figure shows."""
    return figure.plan()


def source(figure: Figure) -> str:
    """SVG or DOT text of a figure."""
    return figure.draw(plan_of(figure), figure.title)


def readme() -> str:
    """The page that shows every figure, with the code that made it and the messages that its plan counts."""
    return "\n".join([INTRODUCTION, *map(_section, FIGURES)])


def _section(figure: Figure) -> str:
    plan = plan_of(figure)
    return f"""\
## {figure.heading}

![{figure.plan.__doc__}]({figure.name}.svg)

{figure.words}

```python
{inspect.getsource(figure.plan).rstrip()}
```

{_counts(plan)}
"""


def _counts(plan: gp.Plan) -> str:
    """What crosses in one step, in words."""
    found = []
    for name, part in (("forward", plan.program), ("backward", plan.backward)):
        kinds = Counter(collective.kind for collective in part.collectives)
        together = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.items())
        count = f"{part.num_messages} message{'s' if part.num_messages != 1 else ''} {name}"
        found.append(f"{count} ({format_bytes(part.message_bytes)}{f'; {together}' if together else ''})")
    return f"In a step: {', '.join(found)}."


def main() -> None:
    """Write every picture and the README next to this file."""
    for figure in FIGURES:
        path = HERE / f"{figure.name}.svg"
        if figure.is_dot:
            render(source(figure), HERE / "dot" / f"{figure.name}.dot")
            render(source(figure), path)
        else:
            path.write_text(source(figure), encoding="utf-8")
        print(path)
    (HERE / "README.md").write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
