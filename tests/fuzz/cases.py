"""One case: damage a copy of some files, read it, and judge how that ended."""

import os
import random
import resource
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path

from fastllama import atomic
from fastllama.cli.errors import EXPECTED, report
from fastllama.printable import printable
from tests.fuzz.mutations import damage
from tests.fuzz.targets import TARGETS, Target

MAX_MEMORY_KB = 2**20
MAX_LINE = 2000
"""Characters of a notice or an error."""

ALLOWED = ("same", "error", "notice", "other")
"""The result is as without damage; an error; another result with a notice; another result of a file
that is the user's own."""
FAULTS = ("traceback", "message", "silent", "outside", "memory", "hang", "crash")


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    kind: str
    """One of `ALLOWED` or `FAULTS`."""
    target: str
    case: str
    """The damaged file and the damage."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.target}: {self.kind} after {self.case}\n{self.detail}"


class Fuzzer:
    """Runs cases in a folder of its own. Everything in it but the damaged copy must stay."""

    def __init__(self, root: Path, seed: int, targets: Mapping[str, Target] = TARGETS) -> None:
        """`root` is an empty folder; home, cache and temporary files are in it too."""
        self.root, self.seed, self.targets = root, seed, targets
        self.outside = root / "outside"
        self.outside.mkdir()
        for name in (".bashrc", "train-00000.npy", "notes.json"):
            (self.outside / name).write_text("of somebody else\n")
        for variable in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
            folder = root / variable.lower()
            folder.mkdir()
            os.environ[variable] = str(folder)
        self._cycle = [name for name, target in targets.items() for _ in range(target.weight)]
        self._originals: dict[Callable[[Path], None], Path] = {}
        self._results = {name: self._result(target) for name, target in targets.items()}

    def target_of(self, number: int) -> str:
        """The target of case `number`."""
        return self._cycle[number % len(self._cycle)]

    def run(self, number: int) -> Outcome:
        """Run case `number`. The same number and seed always damage in the same way."""
        name = self.target_of(number)
        original = self._originals[self.targets[name].make]
        draw = random.Random(f"{self.seed} {number}")
        copy = self._copy(original)
        files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != ".lock")
        path = draw.choice(files)
        kind = damage(path, self.outside, draw)
        outcome = self._judge(name, path, kind, self._snapshot(), copy)
        self._clean(original)
        return outcome

    def _judge(
        self, name: str, path: Path, kind: str, before: dict[str, object], copy: Path
    ) -> Outcome:
        target = self.targets[name]
        case = f"{kind} of {path.relative_to(copy)}"
        memory = _peak_memory_kb()
        result, error, printed = self._use(target, copy)

        def ended(kind: str, detail: str = "") -> Outcome:
            return Outcome(kind, name, case, detail)

        if self._snapshot() != before:
            return ended("outside", "files outside of the folder have changed")
        if _peak_memory_kb() - memory > MAX_MEMORY_KB:
            return ended("memory", f"{(_peak_memory_kb() - memory) // 1024} MiB")
        if error is not None and not isinstance(error, EXPECTED):
            return ended("traceback", "".join(traceback.format_exception(error)))
        if problem := _problem_of(printed):
            return ended("message", f"{problem}: {printed[-MAX_LINE:]!r}")
        # A file of a checkpoint may be named by the checkpoint, a missing file by its folder.
        names = {path.name, str(copy) if kind == "remove" else path.name}
        names |= {path.parent.name} - {copy.name}
        names_file = any(printable(name) in printed for name in names)
        if error is not None:
            # The only input of a folder is named by the folder.
            if names_file or len(list(copy.rglob("*"))) <= 1:
                return ended("error")
            return ended("message", f"no file name: {printed}")
        if result == self._results[name]:
            return ended("same")
        if names_file:
            return ended("notice")
        is_free = any(fnmatch(path.name, pattern) for pattern in target.free)
        is_free |= kind in ("remove", "make_a_folder") and target.may_lack
        return ended("other") if is_free else ended("silent", f"{result!r}"[:MAX_LINE])

    def _use(self, target: Target, copy: Path) -> tuple[object, BaseException | None, str]:
        """The result of reading `copy`, or its error, and what was printed."""
        atomic._reported.clear()
        result, failure = None, None
        with (
            redirect_stdout(StringIO()) as printed,
            redirect_stderr(printed),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            try:
                result = target.use(copy, copy.parent)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # Also the panics of libraries written in Rust.
                failure = error
                if isinstance(error, EXPECTED):
                    report(error, debug=False)
        return result, failure, printed.getvalue()

    def _result(self, target: Target) -> object:
        """Make the good files of a target, and read them."""
        if target.make not in self._originals:
            folder = self.root / f"files-{len(self._originals)}"
            folder.mkdir()
            target.make(folder / "original")
            self._originals[target.make] = folder / "original"
        original = self._originals[target.make]
        result, error, _ = self._use(target, self._copy(original))
        if error is not None:
            raise error
        self._clean(original)
        return result

    def _copy(self, original: Path) -> Path:
        copy = original.with_name("copy")
        shutil.copytree(original, copy, symlinks=True)
        return copy

    def _clean(self, original: Path) -> None:
        shutil.rmtree(original.with_name("copy"))

    def _snapshot(self) -> dict[str, object]:
        """Every path below the root, except those of the damaged copy."""
        found: dict[str, object] = {}
        for folder, folders, files in os.walk(self.root):
            if os.path.basename(folder).startswith("files-"):
                folders[:] = [name for name in folders if name != "copy"]
            for name in (*files, *folders):
                path = os.path.join(folder, name)
                status = os.lstat(path)
                is_file = name in files
                found[path] = is_file and (status.st_ino, status.st_size, status.st_mtime_ns)
        return found


def _problem_of(printed: str) -> str | None:
    """What is wrong with what a user sees, or None."""
    if any(len(line) > MAX_LINE for line in printed.split("\n")):
        return "a line is too long"
    if printable(printed, keep="\n") != printed:
        return "control characters"
    if "Traceback" in printed:
        return "a traceback"
    return None


def _peak_memory_kb() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, the peak that `getrusage` tells includes that of the process that started this.
        return int(status.read_text().partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak
