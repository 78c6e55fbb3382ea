"""Writes the source of the Python standard library as a training corpus in JSON Lines."""

import argparse
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fastllama.atomic import write_atomic
from fastllama.printable import printable

# `encodings` holds tables of character codes. A model trained on them writes hexadecimal numbers.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings"}


def read_sources(folder: Path, unreadable: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield (path relative to `folder`, source) of each Python file below it, sorted by path.

    Leaves out empty files and copies of an earlier file. Files that cannot be read or decoded are
    added to `unreadable`.
    """
    seen = {""}
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if EXCLUDED_FOLDERS.intersection(relative.parts):
            continue
        if not path.is_file():
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
        except (SyntaxError, UnicodeDecodeError, LookupError, OSError):
            unreadable.append(path)
            continue
        if source not in seen:
            seen.add(source)
            yield relative.as_posix(), source


def write_corpus(output: Path, folder: Path) -> tuple[int, int]:
    """Write the sources below `folder` to `output`, atomically.

    Each line is a JSON object with the fields "path" and "text". Returns the number of documents
    and the number of files that cannot be read or decoded.
    """
    unreadable: list[Path] = []
    lines = [
        json.dumps({"path": path, "text": source}) + "\n"
        for path, source in read_sources(folder, unreadable)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, "".join(lines))
    return len(lines), len(unreadable)


def main() -> None:
    """Write the standard library of the running Python, unless the output file exists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("data/python-stdlib.jsonl"),
        help="JSON Lines file to write (default: %(default)s); an existing file is reused",
    )
    output: Path = parser.parse_args().output
    if output.is_file():
        _say(f"{printable(output)} exists and is reused")
        return
    if output.exists():
        parser.error(f"output {printable(output)} is not a file: choose another --output")
    try:
        documents, unreadable = write_corpus(output, Path(sysconfig.get_paths()["stdlib"]))
    except OSError as error:
        parser.error(f"output {printable(output)} cannot be written: {error.strerror}")
    _say(
        f"{printable(output)}: {documents} documents, {output.stat().st_size / 1e6:.1f} MB; "
        f"{unreadable} files left out that are not text"
    )


def _say(text: str) -> None:
    """Print a line on stdout. A console that is closed or fails ends nothing."""
    # What `print` cannot write, Python tries again when it exits, and exits with 120.
    with suppress(OSError):
        os.write(1, os.fsencode(f"{text}\n"))


if __name__ == "__main__":
    main()
