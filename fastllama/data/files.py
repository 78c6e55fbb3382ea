"""Finds input files, and accounts for every file and folder that it leaves out."""

import fnmatch
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastllama.data.hub import find_shards, is_hub
from fastllama.data.remote_files import path_of
from fastllama.data.trees import MAGIC, Disk, InputFile, RemoteTree, Tree
from fastllama.printable import printable, shortened
from fastllama.urls import is_url

TEXTS = (".txt", ".json", ".jsonl", ".ndjson")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (
    ".parquet",
    *TEXTS,
    *(text + compression for text in TEXTS for compression in COMPRESSIONS),
)
"""Suffixes of files with documents."""

HIDDEN = "hidden"
OTHER_SUFFIX = "other suffixes"
UNREADABLE = "unreadable"
BROKEN_LINK = "broken links"
NOT_A_FILE = "FIFOs, sockets and devices"
SEARCHED_BEFORE = "folders searched already"
DATA_FOLDER = "data folders of fastllama"
ARROW = "Arrow files (`dataset.to_parquet` exports them)"
METADATA = "descriptions of a dataset"

NAMED = 3
"""Names that the summary gives of each kind of entry left out."""

_DATA_FOLDERS = ({"job.json", ".lock"}, {"job.json", "manifest.json"})
"""Names that together mark a data folder: its JSON files hold no documents."""
_SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class FileKind:
    """Files that a command reads."""

    suffixes: tuple[str, ...]
    """In lower case; any case is accepted."""
    known: str
    """The suffixes as a message lists them."""
    remedy: str
    """What to do with a file of another suffix."""

    def has(self, path: str) -> bool:
        """Whether `path`, which may be a URL, has one of the suffixes."""
        return path_of(path).lower().endswith(self.suffixes)


DOCUMENTS = FileKind(
    SUFFIXES,
    f"{', '.join(TEXTS)} (also with {', '.join(COMPRESSIONS)}) or .parquet",
    "convert it (`dataset.to_parquet` does for .arrow), or unpack it first",
)


@dataclass
class LeftOut:
    """Entries left out for one reason: their number and the first `NAMED` of their names."""

    count: int = 0
    names: list[str] = field(default_factory=list)


@dataclass
class InputFiles:
    """The files to read, absolute and sorted, and the entries left out, by reason."""

    kind: FileKind = DOCUMENTS
    paths: list[InputFile] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    """The commits of the hub's data sets that were named by a branch, by "OWNER/NAME@BRANCH"."""

    def leave_out(self, path: str, reason: str) -> None:
        entries = self.left_out.setdefault(reason, LeftOut())
        entries.count += 1
        if len(entries.names) < NAMED:
            entries.names.append(_shown(path, 100))

    def describe_left_out(self) -> str:
        """One clause: "hidden 2 (.git, a/.b.txt), unreadable 1 (c)", or "" if nothing is."""
        clauses = []
        for reason, entries in self.left_out.items():
            more = ", …" if entries.count > len(entries.names) else ""
            clauses.append(f"{reason} {entries.count:,} ({', '.join(entries.names)}{more})")
        return ", ".join(clauses)


def find_files(
    inputs: Sequence[str], kind: FileKind = DOCUMENTS, commits: Mapping[str, str] | None = None
) -> InputFiles:
    """The files of `kind` in `inputs`, each once.

    Inputs are files, folders and glob patterns, on the disk or URLs, and data sets of the hub.
    Folders are searched recursively, through links too, each folder once. Folders and patterns give
    only visible files with a suffix of `kind`. Files on the disk come first. Those behind URLs are
    in the order that their names would have on a disk. `commits` are those of an earlier call, to
    find the same data sets again.

    Raises:
        ValueError: an input gives no file, is a file with another suffix, or cannot be read.
        OSError: the network fails.
    """
    found: set[InputFile] = set()
    files = InputFiles(kind, commits=dict(commits or {}))
    for value in inputs:
        if is_url(value) and is_hub(value):
            found.update(find_shards(value, files.commits))
            continue
        scheme, _, rest = value.partition("://") if is_url(value) else ("", "", "")
        tree: Tree = Disk() if scheme in ("", "file") else RemoteTree()
        path = rest if scheme == "file" else value
        matches = [tree.file(match) for match in _files_of(path, tree, files)]
        if not matches:
            left_out = files.describe_left_out()
            raise ValueError(
                f"input '{_shown(value)}' matches no file{tree.problem}: name files, folders or "
                f"patterns with one of the suffixes {kind.known}"
                + (f"; left out: {left_out}" if left_out else "")
            )
        found.update(matches)
    unique: dict[str, InputFile] = {}
    # As paths are sorted: folder by folder.
    for file in sorted(found, key=lambda file: (not isinstance(file, Path), str(file).split("/"))):
        unique.setdefault(os.path.realpath(file) if isinstance(file, Path) else str(file), file)
    files.paths = list(unique.values())
    return files


def _files_of(value: str, tree: Tree, files: InputFiles) -> Iterator[str]:
    path = value if tree.mode(value) else os.path.expanduser(value)
    mode = tree.mode(path)
    if stat.S_ISREG(mode):
        _check_named_file(path, tree, files.kind)
        yield path
    elif stat.S_ISDIR(mode):
        if not tree.can_read(path):
            raise ValueError(
                f"cannot read the folder {_shown(path)}: permission denied; change its permissions"
            )
        yield from _files_below(path, tree, files)
    elif mode:
        raise ValueError(
            f"cannot read {_shown(path)}: it is {_SPECIAL[stat.S_IFMT(mode)]}, not a file; "
            "write its text to a file first, because an interrupted command reads it again"
        )
    else:
        for match in _matches(path, tree, files):
            if stat.S_ISDIR(tree.mode(match)):
                yield from _files_below(match, tree, files)
            elif _is_usable(match, tree, files):
                yield match


def _check_named_file(path: str, tree: Tree, kind: FileKind) -> None:
    if not kind.has(path):
        raise ValueError(
            f"cannot read {_shown(path)}: its suffix is not {kind.known}; {kind.remedy}"
        )
    if not tree.can_read(path):
        raise ValueError(f"cannot read {_shown(path)}: permission denied; change its permissions")


def _files_below(top: str, tree: Tree, files: InputFiles) -> Iterator[str]:
    for folder, names in _folders_below(top, tree, files):
        metadata = _dataset_metadata(names)
        for name in names:
            path = os.path.join(folder, name)
            if name in metadata:
                files.leave_out(path, METADATA)
            elif not stat.S_ISDIR(tree.mode(path)) and _is_usable(path, tree, files):
                yield path


def _folders_below(top: str, tree: Tree, files: InputFiles) -> Iterator[tuple[str, list[str]]]:
    """Yield `top` and each visible folder below it once, with the visible names in it, sorted."""
    searched = set()
    waiting = [(top, tree.target(top))]
    while waiting:
        folder, target = waiting.pop()
        if target in searched:
            files.leave_out(folder, SEARCHED_BEFORE)
            continue
        searched.add(target)
        names = _names_in(folder, tree, files)
        if any(marks.issubset(names) for marks in _DATA_FOLDERS):
            files.leave_out(folder, DATA_FOLDER)
            continue
        visible = [name for name in names if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                files.leave_out(os.path.join(folder, name), HIDDEN)
        yield folder, visible
        for name in reversed(visible):
            path = os.path.join(folder, name)
            if stat.S_ISDIR(tree.mode(path)):
                waiting.append((path, tree.target(path, target)))


def _dataset_metadata(names: Sequence[str]) -> set[str]:
    """Names that Hugging Face's `save_to_disk` gives to JSON files without documents."""
    has_arrow = any(name.endswith(".arrow") for name in names)
    return {"dataset_dict.json"} | ({"dataset_info.json", "state.json"} if has_arrow else set())


def _names_in(folder: str, tree: Tree, files: InputFiles) -> list[str]:
    names = tree.names(folder)
    if names is None:
        files.leave_out(folder, UNREADABLE)
    return names or []


def _is_usable(path: str, tree: Tree, files: InputFiles) -> bool:
    """Whether to read `path`, found in a folder or by a pattern. If not, leave it out."""
    mode = tree.mode(path)
    reason = ""
    if not mode:
        reason = BROKEN_LINK
    elif not stat.S_ISREG(mode):
        reason = NOT_A_FILE
    elif not files.kind.has(path):
        reason = ARROW if path.endswith(".arrow") else OTHER_SUFFIX
    elif not tree.can_read(path):
        reason = UNREADABLE
    if reason:
        files.leave_out(path, reason)
    return not reason


def _matches(pattern: str, tree: Tree, files: InputFiles) -> list[str]:
    """Paths that match a glob pattern. Unlike `glob.glob`, `**` enters each folder once."""
    start, parts = tree.split(pattern)
    while parts and parts[-1] == "**":  # Everything below: the folder itself means the same.
        parts.pop()
    found = [start] if pattern and tree.mode(start) else []
    for part in parts:
        found = [below for path in found for below in _step(path, part, tree, files)]
        found = list(dict.fromkeys(found))
    only_folders = pattern.endswith("/")
    return [path for path in found if not only_folders or stat.S_ISDIR(tree.mode(path))]


def _step(folder: str, part: str, tree: Tree, files: InputFiles) -> list[str]:
    """Paths in `folder` that fit one part of a pattern. Only a leading dot fits hidden names."""
    if not stat.S_ISDIR(tree.mode(folder)):
        return []
    if part == "**":
        return [below for below, _ in _folders_below(folder, tree, files)]
    literal = os.path.join(folder, part)  # A name may contain the characters of a pattern.
    found = [literal] if tree.has_name(literal) else []
    if any(character in part for character in MAGIC):
        found += [
            os.path.join(folder, name)
            for name in _names_in(folder, tree, files)
            if fnmatch.fnmatchcase(name, part) and (part[0] == "." or name[0] != ".")
        ]
    return found


def _shown(path: str, limit: int = 300) -> str:
    return shortened(printable(path), limit)
