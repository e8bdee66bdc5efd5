"""The table of a sweep, in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sweep_parts.harness import MODES, Verdict

STATUSES = ("right", "apart", "part", "refused", "wrong", "error", "time")
"""What can come of an architecture that runs on one device."""

HEADER = """# Architectures

`make sweep` builds small models of random weights, and trains each for two calls on three workers: by `layer` with one
microbatch and with two, by `feature` and by `hybrid`. Outputs, gradients, absent gradients and buffers are compared
with the plain model's after each call. An architecture is *right* if it is so in all four modes, with at least 80 % of
the FLOPs of a forward in planned graphs, on two or more workers; *apart* if numbers are right, but more than that ran
in islands or eagerly; *part* if it was right, but not yet tried in all modes; *refused* if a named error came first;
*wrong* if numbers differ, *error* if another exception came, *time* if the limit passed. What does not run on one
device in these sizes is not counted.
"""


def report(verdicts: Sequence[Verdict], versions: Mapping[str, str], date: str, limit_s: float, num_listed: int) -> str:
    """The whole page.

    Args:
        verdicts: what came of architectures.
        versions: of the libraries that were there; for one that was not, the reason.
        date: when.
        limit_s: CPU time for one architecture.
        num_listed: architectures that the sweep has.
    """
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    run = f"Last run: {date}; {told}. At most {limit_s:g} s of CPU time an architecture."
    lines = [HEADER, run, f"Of {num_listed} architectures that the sweep lists, {len(verdicts)} have been run.", ""]
    lines += ["| library | tried | " + " | ".join(STATUSES) + " |", "|---|---|" + "---|" * len(STATUSES)]
    libraries = list(dict.fromkeys(verdict.library for verdict in verdicts))
    tried = [verdict for verdict in verdicts if not verdict.absent]
    for library in libraries:
        lines.append(_row(library, [v for v in tried if v.library == library]))
    lines += [_row("all", tried), "", "## Modes", "", "| mode | right | not |", "|---|---|---|"]
    for mode in MODES:
        found = [v.modes[mode].status for v in tried if mode in v.modes]
        lines.append(f"| {mode} | {found.count('right')} | {len(found) - found.count('right')} |")
    lines += ["", "## Not right", "", "| architecture | | why |", "|---|---|---|"]
    lines += [
        f"| {v.library}: {v.name} | {v.status} | {_cell(v.reason)} |" for v in _sorted(tried) if v.status != "right"
    ]
    lines += ["", "## Right", ""]
    lines += [_names(library, [v for v in tried if v.library == library]) for library in libraries]
    lines += ["", "## Not tried", "", "| architecture | why |", "|---|---|"]
    lines += [f"| {v.library}: {v.name} | {_cell(v.absent)} |" for v in _sorted(verdicts) if v.absent]
    return "\n".join(lines) + "\n"


def _row(name: str, verdicts: Sequence[Verdict]) -> str:
    counts = Counter(verdict.status for verdict in verdicts)
    return f"| {name} | {len(verdicts)} | " + " | ".join(str(counts[status]) for status in STATUSES) + " |"


def _names(library: str, verdicts: Iterable[Verdict]) -> str:
    return f"- {library}: " + ", ".join(sorted(v.name for v in verdicts if v.status == "right"))


def _sorted(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return sorted(verdicts, key=lambda v: (v.library, v.status, v.name))


def _cell(text: str) -> str:
    short = text if len(text) <= 240 else text[:237] + "..."
    return short.replace("|", "\\|").replace("<", "&lt;")
