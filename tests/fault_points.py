"""The points of the code at which tests/faults.py causes faults."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastllama.checkpoints.folder
import fastllama.checkpoints.writing
import fastllama.train
from fastllama.checkpoints import shards
from fastllama.checkpoints.shards import ShardWriter
from fastllama.checkpoints.state import TrainState
from fastllama.logs import log_file

Trigger = Callable[..., None]
"""Called at each visit of a point. At one visit it causes the fault, after calling its argument,
which leaves the work at this point half done."""


def before_update(trigger: Trigger) -> None:
    original = fastllama.train.update

    def update(*args: Any) -> Any:
        trigger()
        return original(*args)

    fastllama.train.update = update


def after_update(trigger: Trigger) -> None:
    original = fastllama.train.update

    def update(*args: Any) -> Any:
        result = original(*args)
        trigger()
        return result

    fastllama.train.update = update


def half_a_log_row(trigger: Trigger) -> None:
    original = log_file.append

    def append(path: Path, content: bytes) -> None:
        trigger(lambda: original(path, content[: len(content) // 2]))
        original(path, content)

    log_file.append = append


def half_staged(trigger: Trigger) -> None:
    original = TrainState.tensors

    class TriggeringDict(dict[str, Any]):
        def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
            for number, item in enumerate(super().items()):
                if number == len(self) // 2:
                    trigger()
                yield item

    TrainState.tensors = lambda state: TriggeringDict(original(state))  # type: ignore[method-assign]


def half_a_shard(trigger: Trigger) -> None:
    original = shards.write_safetensors

    class TriggeringFile:
        def __init__(self, file: Any) -> None:
            self._file, self._visited = file, False

        def write(self, content: bytes | memoryview) -> None:
            # The header is bytes, a tensor a view of its memory.
            if isinstance(content, memoryview) and not self._visited:
                self._visited = True
                trigger(lambda: self._file.write(content[: len(content) // 2]))
            self._file.write(content)

    def write_safetensors(file: Any, *arguments: Any) -> None:
        original(TriggeringFile(file), *arguments)

    shards.write_safetensors = write_safetensors  # type: ignore[assignment]


def after_the_shards(trigger: Trigger) -> None:
    original = ShardWriter.write_data

    def write_data(self: ShardWriter, *arguments: Any) -> Any:
        written = original(self, *arguments)
        trigger()
        return written

    ShardWriter.write_data = write_data  # type: ignore[method-assign]


def half_a_json(name: str) -> Callable[[Trigger], None]:
    def install(trigger: Trigger) -> None:
        original = fastllama.checkpoints.writing.write_atomic

        def write_atomic(path: Path, content: str) -> None:
            if path.name == name:
                aside = path.with_name(f".{path.name}.partial")
                trigger(lambda: aside.write_text(content[: len(content) // 2]))
            original(path, content)

        fastllama.checkpoints.writing.write_atomic = write_atomic

    return install


def at_rename(pattern: str, after: bool) -> Callable[[Trigger], None]:
    def install(trigger: Trigger) -> None:
        original = os.replace

        def replace(source: Any, target: Any) -> None:
            matches = re.fullmatch(pattern, Path(target).name) is not None
            if matches and not after:
                trigger()
            original(source, target)
            if matches and after:
                trigger()

        os.replace = replace

    return install


def half_removed(trigger: Trigger) -> None:
    original = fastllama.checkpoints.folder.remove_files

    def remove_files(folder: Path) -> None:
        if folder.name.endswith(".removed"):
            trigger(lambda: next(iter(folder.iterdir())).unlink())
        original(folder)

    fastllama.checkpoints.folder.remove_files = remove_files


@dataclass(frozen=True)
class Point:
    """A point of the code at which a fault can happen."""

    install: Callable[[Trigger], None]
    """Makes the code call a trigger at this point."""
    visits: int
    """About the most visits by one rank until the next checkpoint is saved."""
    main_only: bool
    """Whether only the main rank visits it."""


POINTS = {
    "before the update": Point(before_update, 6, False),
    "after the update": Point(after_update, 6, False),
    "half a log row": Point(half_a_log_row, 12, True),
    "half staged": Point(half_staged, 2, False),
    "half a shard": Point(half_a_shard, 2, False),
    "after the shards": Point(after_the_shards, 2, False),
    "half a progress.json": Point(half_a_json("progress.json"), 2, True),
    "half a manifest.json": Point(half_a_json("manifest.json"), 2, True),
    "before the rename": Point(at_rename(r"step-\d+", after=False), 2, True),
    "after the rename": Point(at_rename(r"step-\d+", after=True), 2, True),
    "before latest": Point(at_rename("latest", after=False), 2, True),
    "after latest": Point(at_rename("latest", after=True), 2, True),
    "before a removal": Point(at_rename(r".*\.removed", after=False), 1, True),
    "half removed": Point(half_removed, 1, True),
}
