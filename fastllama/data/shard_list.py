"""The checksums of a split's complete shards, in a file that only grows while `prepare` runs.

A line is what `sha256sum` prints. Recording progress appends the lines of new shards, so it takes
the same time after ten thousand shards as after the first.
"""

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from fastllama.atomic import fsync_file, fsync_folder, naming, no_links
from fastllama.data.manifest import Shard, damaged
from fastllama.typed_json import DamagedFileError, read_regular

LINE = re.compile(rb"([0-9a-f]{64})  (\S+)")


class ShardList:
    """The complete `shards` of one split, and the file that lists their checksums."""

    def __init__(
        self, folder: Path, split: str, recorded: int, sha256: str, shard_tokens: int
    ) -> None:
        """Read the first `recorded` lines, which have the checksum `sha256`.

        Each is a shard of `shard_tokens`. Later lines were never recorded, and are overwritten.

        Raises:
            DamagedFileError: the file is missing or has other lines.
            OSError: the file cannot be read.
        """
        self.path = list_path(folder, split)
        self.shards: list[Shard] = []
        self._digest = hashlib.sha256()
        self._bytes = self._written = 0
        if not recorded:
            return
        if not self.path.exists():
            raise damaged(self.path, "no such file", f"{recorded} lines")
        lines = read_regular(self.path).split(b"\n")[:-1][:recorded]
        self._count(b"".join(line + b"\n" for line in lines))
        if self._digest.hexdigest() != sha256:
            raise damaged(self.path, f"SHA-256 {self._digest.hexdigest()} of its lines", sha256)
        for number, line in enumerate(lines):
            name = shard_name(split, number)
            match = LINE.fullmatch(line)
            if match is None or match[2] != name.encode():
                raise DamagedFileError(f"{self.path}: line {number + 1} is not that of {name}")
            self.shards.append(Shard(name, shard_tokens, match[1].decode()))
        self._written = len(lines)

    def write(self) -> str:
        """Append the shards that are new, flush the file, and return the SHA-256 of all lines.

        Raises:
            ValueError: the file was replaced by a link.
        """
        new = "".join(f"{shard.sha256}  {shard.file}\n" for shard in self.shards[self._written :])
        if new:
            if not os.path.lexists(self.path):
                with naming(self.path), open(self.path, "xb"):
                    pass
                fsync_folder(self.path.parent)
            with naming(self.path), open_own(self.path) as file:
                file.truncate(self._bytes)
                file.seek(self._bytes)
                file.write(new.encode())
            fsync_file(self.path)
            self._count(new.encode())
            self._written = len(self.shards)
        return self._digest.hexdigest() if self.shards else ""

    def _count(self, lines: bytes) -> None:
        self._digest.update(lines)
        self._bytes += len(lines)


def list_path(folder: Path, split: str) -> Path:
    """The file that lists the complete shards of `split`."""
    return folder / f"{split}.sha256"


def shard_name(split: str, number: int) -> str:
    """File name of shard `number` of `split`, from 0."""
    return f"{split}-{number:05d}.npy"


def open_own(path: Path) -> BinaryIO:
    """Open a file that `prepare` created, to change it.

    Raises:
        ValueError: the file was replaced by a link or by another kind of file.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise ValueError(
            f"{path} was replaced by a link or a special file: delete {path.parent} and prepare "
            "the data again"
        )
    return open(path, "r+b", opener=no_links)
