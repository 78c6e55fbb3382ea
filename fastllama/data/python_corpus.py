"""The Python standard library as a training corpus: every machine that runs this has it."""

import argparse
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from fastllama.atomic import write_atomic

# The encodings are tables of character codes: a model of them writes hexadecimal, not Python.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings"}


def read_sources(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (path relative to `folder`, source) of each Python file below it, sorted by path.

    Empty files, files that cannot be decoded, and repetitions of an earlier file are left out.
    """
    seen = {""}
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if EXCLUDED_FOLDERS.intersection(relative.parts):
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if source not in seen:
            seen.add(source)
            yield relative.as_posix(), source


def write_corpus(output: Path, folder: Path) -> int:
    """Write the sources below `folder` as JSON Lines with "path" and "text"; return their number.

    Either all of `output` is written or none of it.
    """
    lines = [
        json.dumps({"path": path, "text": source}) + "\n" for path, source in read_sources(folder)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, "".join(lines))
    return len(lines)


def main() -> None:
    """Write the standard library of the running Python, unless the output is already there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("data/python-stdlib.jsonl"))
    output: Path = parser.parse_args().output
    if output.exists():
        print(f"{output} exists and is reused")
        return
    documents = write_corpus(output, Path(sysconfig.get_paths()["stdlib"]))
    print(f"{output}: {documents} documents, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
