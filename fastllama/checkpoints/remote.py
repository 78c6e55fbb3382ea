"""A copy of a run's checkpoints behind a URL: uploaded while it trains, fetched by a fresh machine.

    URL/NAME/config.toml, tokenizer.json
    URL/NAME/checkpoints/step-00000512/     the files of a checkpoint

Object storage has no rename. So manifest.json comes last and goes first: a folder that has one is
complete.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from fastllama.atomic import fsync_file, fsync_folder, replace
from fastllama.checkpoints.folder import (
    FILE,
    NAME,
    CheckpointManifest,
    complete_checkpoints,
    describe,
    make_way,
    permanent,
    remove_files,
)
from fastllama.checkpoints.reading import find_difference
from fastllama.config import Config
from fastllama.errors import reason
from fastllama.run_folder import RunFolder
from fastllama.typed_json import DamagedFileError, read_json
from fastllama.urls import patiently

MANIFEST = "manifest.json"
HIDDEN = "passed-over-manifest.json"
TRANSFERS = 4
"""Files that are sent or fetched at a time. Some libraries hold whole files in memory."""


def remote_run(config: Config, run: RunFolder) -> str:
    """Where `checkpoint.upload` puts the copy of `run`; the name of its folder tells it apart."""
    return f"{config.checkpoint.upload.rstrip('/')}/{run.path.absolute().name}"


def upload_options(run: RunFolder, config: Config) -> None:
    """Upload what generation and export need besides a checkpoint.

    Raises:
        ValueError: nothing may be written there.
        OSError: the network fails.
    """
    for path in (run.config, run.tokenizer):
        _put(path, f"{remote_run(config, run)}/{path.name}")


class CheckpointUploader:
    """Uploads the checkpoints of a run, one at a time, in a thread of the main process.

    What it cannot upload it reports. The next checkpoint tries again.
    """

    def __init__(self, run: RunFolder, config: Config, report: Callable[[str], None]) -> None:
        """Call `report` with one sentence for each checkpoint."""
        self.failure = ""
        """Why the last upload failed; empty if it did not."""
        self._run, self._config, self._report = run, config, report
        self._url = remote_run(config, run)
        self._wanted: Path | None = None
        self._is_busy = False
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="upload", daemon=True).start()

    def upload(self, checkpoint: Path) -> None:
        """Upload a complete checkpoint next, instead of an older one that has not begun."""
        with self._changed:
            self._wanted = checkpoint
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is left to upload, at most for some seconds; return whether it is."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._wanted is None and not self._is_busy, seconds
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted is not None)
                checkpoint, self._wanted, self._is_busy = self._wanted, None, True
            assert checkpoint is not None
            self._upload_and_report(checkpoint)
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _upload_and_report(self, newest: Path) -> None:
        start = time.perf_counter()
        try:
            self._upload_missing(newest)
            self.failure = ""
        except Exception as error:  # A failed upload never ends a training.
            if not newest.exists():
                return  # A newer checkpoint has replaced it, and is uploaded next.
            words = str(error) if isinstance(error, (OSError, ValueError)) else reason(error)
            self.failure = f"The checkpoint {newest} could not be uploaded: {words}"
            self._report(f"{self.failure}; training continues, and the next one tries again.")
            return
        seconds = time.perf_counter() - start
        self._report(f"uploaded {self._url}/checkpoints/{newest.name} ({seconds:.2f} s)")
        try:
            self._remove_old(newest)
        except (OSError, ValueError) as error:
            self._report(f"Older checkpoints in {self._url} are not removed: {error}.")

    def _upload_missing(self, newest: Path) -> None:
        """Upload `newest`, and permanent checkpoints of which an earlier upload failed."""
        upload_options(self._run, self._config)
        there = list_checkpoints(self._url)
        local = complete_checkpoints(newest.parent)[::-1]
        for path in (newest, *permanent(local, self._config)):
            if path == newest or path.name not in there:
                self._upload(path, there.get(path.name, {}))

    def _upload(self, checkpoint: Path, there: dict[str, int]) -> None:
        url = f"{self._url}/checkpoints/{checkpoint.name}"
        files = read_json(checkpoint / MANIFEST, CheckpointManifest).files
        if there:
            # One that the run went back behind, and saves once more.
            _remove(url, [MANIFEST])
        with ThreadPoolExecutor(TRANSFERS) as pool:
            sent = [pool.submit(_put, checkpoint / name, f"{url}/{name}") for name in files]
            for each in sent:
                each.result()
        sizes = _list_files(url)
        for name, entry in files.items():
            if sizes.get(name) != entry.bytes:
                raise OSError(f"{url}/{name} has {sizes.get(name)} of {entry.bytes} bytes")
        _put(checkpoint / MANIFEST, f"{url}/{MANIFEST}")

    def _remove_old(self, newest: Path) -> None:
        """Keep of the older checkpoints those that the run keeps; hide later ones.

        Later ones are of updates that the run has gone back behind. What failed uploads of older
        ones left is removed too.
        """
        there = _list_folders(self._url)
        complete = (name for name, files in there.items() if MANIFEST in files)
        paths = [Path(name) for name in sorted(complete) if name <= newest.name]
        kept = {*paths[-self._config.checkpoint.keep_last :], *permanent(paths, self._config)}
        for name, files in there.items():
            url = f"{self._url}/checkpoints/{name}"
            if HIDDEN in files and MANIFEST not in files:
                continue
            if name > newest.name and MANIFEST in files:
                _hide(url)
                self._report(f"{url} is passed over: its {MANIFEST} is now {HIDDEN}.")
            elif name < newest.name and Path(name) not in kept:
                _remove(url, [MANIFEST] if MANIFEST in files else [])
                _remove(url, [file for file in files if FILE.fullmatch(file) and file != MANIFEST])
                patiently(url, _remove_empty_folder, verb="write", remedy="check the network")


def list_checkpoints(url: str) -> dict[str, dict[str, int]]:
    """Complete checkpoints of the run at `url`, newest first: the sizes of their files by name.

    Raises:
        ValueError: it may not be read.
        OSError: the network fails.
    """
    found = _list_folders(url)
    return {name: found[name] for name in sorted(found, reverse=True) if MANIFEST in found[name]}


def fetch_newest(
    url: str, folder: Path, identity: dict[str, Any], report: Callable[[str], None]
) -> Iterator[bool]:
    """Download the newest whole checkpoint of the run at `url` into `folder`, if there is one.

    Yields True after every few files, so that no process waits for the whole download at once.

    Raises:
        ValueError: it belongs to a run with another identity, or may not be read.
        OSError: the network or the disk fails.
    """
    for name, sizes in list_checkpoints(url).items():
        source, aside = f"{url}/checkpoints/{name}", folder / f".{name}.partial"
        folder.mkdir(exist_ok=True)
        if aside.exists():
            remove_files(aside)
        aside.mkdir()
        try:
            damage = yield from _fetch(source, sizes, aside, identity)
        except (ValueError, OSError):
            remove_files(aside)
            with suppress(OSError):
                folder.rmdir()
            raise
        if damage is None:
            make_way(folder / name)
            replace(aside, folder / name)
            fsync_folder(folder)
            report(f"downloaded {source}")
            return
        remove_files(aside)
        report(f"Not using {source}: {damage}.")


def _fetch(
    source: str, sizes: dict[str, int], aside: Path, identity: dict[str, Any]
) -> Generator[bool, None, str | None]:
    """Download a checkpoint into the folder `aside`; return what is wrong with it, or None."""
    _get(f"{source}/{MANIFEST}", aside / MANIFEST)
    try:
        files = read_json(aside / MANIFEST, CheckpointManifest).files
    except DamagedFileError as error:
        return str(error)
    for name, entry in files.items():
        if not FILE.fullmatch(name):
            return f"{MANIFEST} lists {name!r}, which is not part of a checkpoint"
        if sizes.get(name) != entry.bytes:
            return f"{name} has {sizes.get(name)} of {entry.bytes} bytes"
    # The rest may take hours, and belong to another run.
    if "progress.json" not in files:
        return f"{MANIFEST} does not list progress.json"
    _get(f"{source}/progress.json", aside / "progress.json")
    if difference := find_difference(aside, identity):
        difference = difference.replace(str(aside), source)
        raise ValueError(
            f"{difference}; keep that value to resume it, or choose another --run-dir or "
            "--checkpoint.upload."
        )
    names = list(files)
    for first in range(0, len(names), TRANSFERS):
        some = names[first : first + TRANSFERS]
        # Not around the loop: a generator that is dropped must not wait for threads.
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: _get(f"{source}/{name}", aside / name), some))
        for name, entry in describe(aside, some).items():
            if entry != files[name]:
                return f"{name} is not what was written"
            fsync_file(aside / name)
        yield True
    return None


def _list_folders(url: str) -> dict[str, dict[str, int]]:
    """Folders of checkpoints, complete or not: the sizes of their files by name."""
    found: dict[str, dict[str, int]] = {}
    for path, size in _list_files(f"{url}/checkpoints").items():
        folder, _, name = path.rpartition("/")
        if NAME.fullmatch(folder):
            found.setdefault(folder, {})[name] = size
    return found


def _list_files(url: str) -> dict[str, int]:
    """Sizes of the files below `url`, by their paths from there."""

    def find(files: AbstractFileSystem, path: str) -> dict[str, int]:
        files.invalidate_cache()
        found = files.find(path, detail=True)
        top = f"{path.strip('/')}/"
        return {name.strip("/").removeprefix(top): info["size"] for name, info in found.items()}

    try:
        return patiently(url, find)
    except FileNotFoundError:
        return {}


def _put(path: Path, url: str) -> None:
    def put(files: AbstractFileSystem, target: str) -> None:
        files.put_file(str(path), target)

    try:
        patiently(url, put, verb="write", remedy="check the network")
    except FileNotFoundError as error:  # There is no such bucket.
        raise ValueError(
            f"cannot write {url}: {error.strerror}; set checkpoint.upload to a folder or bucket "
            "where you may write"
        ) from None


def _get(url: str, path: Path) -> None:
    patiently(url, lambda files, source: files.get_file(source, str(path)))


def _remove(url: str, names: Sequence[str]) -> None:
    """Remove files of a checkpoint. Some may be gone: by a try that failed later."""

    def remove(files: AbstractFileSystem, folder: str) -> None:
        if names:
            files.rm([f"{folder}/{name}" for name in names])

    with suppress(FileNotFoundError):
        patiently(url, remove, verb="write", remedy="check the network")


def _remove_empty_folder(files: AbstractFileSystem, folder: str) -> None:
    """Remove a folder without files, where the store has folders."""
    files.invalidate_cache()
    if files.isdir(folder) and not files.ls(folder):
        files.rmdir(folder)


def _hide(checkpoint: str) -> None:
    """Rename the manifest of a checkpoint, so that it is not complete any more."""

    def copy(files: AbstractFileSystem, folder: str) -> None:
        files.cp_file(f"{folder}/{MANIFEST}", f"{folder}/{HIDDEN}")

    patiently(checkpoint, copy, verb="write", remedy="check the network")
    _remove(checkpoint, [MANIFEST])
