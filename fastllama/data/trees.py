"""Folders and files as `find_files` walks them: of the disk, or behind URLs."""

import os
import stat
from pathlib import Path
from typing import Any, Protocol

from fsspec import AbstractFileSystem

from fastllama.data.hub import HubShard
from fastllama.data.remote_files import RemoteFile
from fastllama.urls import patiently

TreeFile = Path | RemoteFile
InputFile = TreeFile | HubShard
MAGIC = "*?["
"""Characters of a pattern."""


class Tree(Protocol):
    """Where an input is searched. Paths are strings with slashes."""

    problem: str
    """Why a path is not there, in parentheses; empty on a disk, where it says nothing new."""

    def mode(self, path: str) -> int:
        """The mode of the file that `path` leads to, as of os.stat; 0 if there is none."""

    def names(self, folder: str) -> list[str] | None:
        """The names in a folder, sorted; None if it may not be read."""

    def can_read(self, path: str) -> bool:
        """Whether this file or folder may be read."""

    def has_name(self, path: str) -> bool:
        """Whether `path` is there, even if it leads nowhere."""

    def target(self, path: str, folder_target: str | None = None) -> str:
        """Where `path` leads, the same for all paths of one folder.

        `folder_target`, where it is known, is the target of the folder that `path` is in.
        """

    def split(self, pattern: str) -> tuple[str, list[str]]:
        """The folder where to search for a pattern, and the parts of the pattern below it."""

    def file(self, path: str) -> TreeFile:
        """The file at `path`."""


class Disk:
    """The files of this machine."""

    problem = ""

    def mode(self, path: str) -> int:
        try:
            return os.stat(path).st_mode
        except (
            OSError,
            ValueError,
        ):  # Among others: links in a circle, a name too long or with NUL.
            return 0

    def names(self, folder: str) -> list[str] | None:
        try:
            if self.can_read(folder):
                return sorted(os.listdir(folder))
        except OSError:
            pass
        return None

    def can_read(self, path: str) -> bool:
        is_folder = stat.S_ISDIR(self.mode(path))
        return os.access(path, os.R_OK | os.X_OK if is_folder else os.R_OK)

    def has_name(self, path: str) -> bool:
        return os.path.lexists(path)

    def target(self, path: str, folder_target: str | None = None) -> str:
        if folder_target is None or os.path.islink(path):
            return os.path.realpath(path)
        return os.path.join(folder_target, os.path.basename(path))

    def split(self, pattern: str) -> tuple[str, list[str]]:
        start = "/" if pattern.startswith("/") else "."
        return start, [part for part in pattern.split("/") if part]

    def file(self, path: str) -> TreeFile:
        return Path(path).absolute()


class RemoteTree:
    """The files behind URLs. A folder is listed once.

    Its methods raise ValueError where a folder or file may not be read, so that no document is
    missing without a word, and OSError where the network fails.
    """

    def __init__(self) -> None:
        self.problem = ""
        self._infos: dict[str, dict[str, Any] | None] = {}
        self._names: dict[str, list[str]] = {}

    def mode(self, path: str) -> int:
        info = self._info(path)
        if info is None:
            return 0
        return stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG

    def names(self, folder: str) -> list[str] | None:
        folder = _without_slash(folder)
        if folder not in self._names:

            def entries(files: AbstractFileSystem, path: str) -> list[dict[str, Any]]:
                path = path.rstrip("/")
                listed = files.ls(path, detail=True)
                # An empty object may stand for the folder itself.
                return [entry for entry in listed if entry["name"].rstrip("/") != path]

            found = patiently(folder, entries)
            infos = {os.path.basename(entry["name"].rstrip("/")): entry for entry in found}
            self._infos.update({os.path.join(folder, name): infos[name] for name in infos})
            self._names[folder] = sorted(infos)
        return self._names[folder]

    def can_read(self, path: str) -> bool:
        return True

    def has_name(self, path: str) -> bool:
        return bool(self.mode(path))

    def target(self, path: str, folder_target: str | None = None) -> str:
        return path

    def split(self, pattern: str) -> tuple[str, list[str]]:
        scheme, _, rest = pattern.partition("://")
        parts = [part for part in rest.split("/") if part]
        # A key may give access to some folders of a bucket only.
        n = next((i for i, part in enumerate(parts) if set(MAGIC) & set(part)), len(parts))
        return f"{scheme}://{'/'.join(parts[:n])}", parts[n:]

    def file(self, path: str) -> TreeFile:
        return RemoteFile.find(path, self._info(path))

    def _info(self, path: str) -> dict[str, Any] | None:
        path = _without_slash(path)
        folder, _, name = path.rpartition("/")
        if path not in self._infos and name in self._names.get(folder, [name]):
            try:
                self._infos[path] = patiently(path, lambda files, inner: files.info(inner))
            except FileNotFoundError as error:
                self._infos[path] = None
                self.problem = f" ({error.strerror})"
        return self._infos.get(path)


def _without_slash(url: str) -> str:
    scheme, _, path = url.partition("://")
    return f"{scheme}://{path.rstrip('/')}"
