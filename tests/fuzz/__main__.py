"""Damages files of every kind that the product reads, again and again, and reads them.

    python -m tests.fuzz --seconds 600 --seed 0

Each case copies a folder of good files, damages one of them at random, and reads the folder as the
product does: open and check data, resume a preparation, generate, resume a training, load a recipe,
read documents and token files, load tokenizers. It may end with the result of the undamaged files,
or with an error or a notice that names the file. Another result without a notice is allowed only
for files that are the user's own. Everything else is a fault: a traceback, a hang of over 10 s,
over 1 GB of memory, a crash of the interpreter, a change outside of the damaged folder.

Prints each fault, and a table at the end. Exits with 1 if there was a fault. The cases of a seed
are always the same; `--case N` runs one of them.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.cases import ALLOWED, FAULTS, Fuzzer
from tests.fuzz.supervisor import Supervisor
from tests.fuzz.targets import TARGETS


def table(outcomes: "Counter[tuple[str, str]]") -> str:
    """Outcomes by target, with their sums."""
    kinds = (*ALLOWED, *FAULTS)
    lines = [f"{'':20} {'cases':>7}" + "".join(f"{kind:>10}" for kind in kinds)]
    for name in TARGETS:
        counts = [outcomes[name, kind] for kind in kinds]
        lines.append(f"{name:20} {sum(counts):7}" + "".join(f"{count:10}" for count in counts))
    sums = [sum(outcomes[name, kind] for name in TARGETS) for kind in kinds]
    lines.append(f"{'all':20} {sum(sums):7}" + "".join(f"{count:10}" for count in sums))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long to run")
    parser.add_argument("--seed", type=int, default=0, help="chooses the damage")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--case", type=int, help="run only this case, in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        if options.case is not None:
            outcome = Fuzzer(Path(root), options.seed).run(options.case)
            print(outcome)
            sys.exit(outcome.kind in FAULTS)
        supervisor = Supervisor(options.workers, options.seed, Path(root))
        supervisor.run(options.seconds)
        supervisor.stop()
    print(table(supervisor.outcomes))
    print(f"seed {options.seed}, {options.seconds:.0f} s, {options.workers} processes")
    sys.exit(supervisor.n_faults > 0)


if __name__ == "__main__":
    main()
