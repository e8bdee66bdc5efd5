"""Twenty steps of training, partitioned and on one device: losses of each step, and parameters at the end.

    python benchmarks/twenty_steps.py [--only NAME ...] [--modes MODE ...] [--steps N] [--out FILE]
    python benchmarks/twenty_steps.py --table docs/twenty_steps.md [--out FILE]    # runs nothing

Each model runs in a process of its own, and what the file calls equal is not run again. Nothing is installed:
a model whose library is missing is passed over, and said to be.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from twenty_parts import MAKERS  # noqa: E402
from twenty_parts.report import page  # noqa: E402
from twenty_parts.training import MODES, NUM_STEPS, Compared, compare, train  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not known to be equal; 1 if something is not equal."""
    options = _parse(arguments)
    found = {} if options.out is None else _known(options.out)
    if options.table is not None:
        options.table.write_text(page(found, time.strftime("%Y-%m-%d")))
        return 0
    for name in options.only:
        left = [mode for mode in options.modes if (name, mode) not in found or found[name, mode].status != "equal"]
        for mode, compared in run(name, left, options.steps):
            found[name, mode] = compared
            print(f"{name:<20} {mode:<14} {_told(compared)}", flush=True)
            if options.out is not None:
                with options.out.open("a") as lines:
                    print(json.dumps({"name": name, "mode": mode, **asdict(compared)}), file=lines)
    return int(any(compared.status != "equal" for compared in found.values()))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--modes", nargs="+", metavar="MODE", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="a line for each, as JSON; read first, to resume")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of --out there, and stop")
    return parser.parse_args(arguments)


def run(name: str, modes: Sequence[str], num_steps: int) -> Iterator[tuple[str, Compared]]:
    """Train a model on one device, and then in each mode."""
    if not modes:
        return
    torch.manual_seed(0)
    try:
        training = MAKERS[name]()
    except ImportError as missing:
        print(f"{name}: {missing}", file=sys.stderr)
        return
    import copy

    plain = train(copy.deepcopy(training.model), training, num_steps)
    for mode in modes:
        yield mode, compare(training, plain, mode, num_steps)


def _told(compared: Compared) -> str:
    return (
        f"{compared.status:<8} loss {compared.loss_difference:.1e} state {compared.state_difference:.1e} "
        f"{100 * compared.share:.0f} % on {compared.devices}, {compared.time_s:.0f} s {compared.reason}"
    )


def _known(path: Path) -> dict[tuple[str, str], Compared]:
    """What a file has; of two lines of one training, the later."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        values = json.loads(line)
        key = values.pop("name"), values.pop("mode")
        found[key] = Compared(**values)
    return found


if __name__ == "__main__":
    sys.exit(main())
