"""stdout and stderr: full disks, readers that went away, closed streams, encodings."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from fastllama.cli.streams import MAX_WAITING, PatientFile, print_result
from tests.runs import losses, train_in_child
from tests.workspace import Workspace

COMMAND = (sys.executable, "-m", "fastllama")


class FullDisk(io.BytesIO):
    """A file with room for `room` more bytes."""

    room = 0

    def write(self, data: Any) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(bytes(data[: self.room]))
        self.room -= written
        return written


def patient_file() -> tuple[PatientFile, FullDisk]:
    disk = FullDisk()
    return PatientFile(cast(Any, disk)), disk


def test_lines_wait_for_a_full_disk() -> None:
    file, disk = patient_file()
    disk.room = 3
    for line in (b"first\n", b"second\n"):
        assert file.write(line) == len(line)
    assert (disk.getvalue(), file.lost_lines()) == (b"fir", 2)
    disk.room = 100
    file.write(b"third\n")
    assert (disk.getvalue(), file.lost_lines(), file.error) == (b"first\nsecond\nthird\n", 0, None)


def test_dropped_lines_are_counted_in_the_file() -> None:
    file, disk = patient_file()
    n_lines = 3 * MAX_WAITING // 10
    for number in range(n_lines):
        file.write(b"%09d\n" % number)
    assert file.lost_lines() == n_lines
    assert file.why() == "No space left on device"
    disk.room = 10 * MAX_WAITING
    file.write(b"end\n")
    assert file.lost_lines() == 0
    _, notice, *kept, last = disk.getvalue().decode().splitlines()
    n_dropped = n_lines - len(kept)
    assert notice == f"[{n_dropped} lines could not be written: No space left on device]"
    assert kept == [f"{number:09}" for number in range(n_dropped, n_lines)]
    assert last == "end"


def test_line_longer_than_the_waiting_room_is_dropped() -> None:
    file, _ = patient_file()
    file.write(b"x" * (MAX_WAITING + 1))
    file.write(b"\nnext")
    assert file.lost_lines() == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["--help", "train --help", "generate --help", "data nonsense"])
def test_help_and_errors_print_in_any_encoding(encoding: str, command: str) -> None:
    done = subprocess.run(
        [*COMMAND, *command.split()],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"},
    )
    assert done.returncode == (2 if "nonsense" in command else 0)
    printed = (done.stdout + done.stderr).decode(encoding)
    assert "Traceback" not in printed
    assert "\\u" not in printed


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_result_that_cannot_be_written_is_a_failure(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == (
        "error: The output could not be written to stdout: No space left on device.\n"
    )


@pytest.mark.parametrize("arguments", ["--help", "train --help"])
def test_reader_that_wanted_only_the_beginning(arguments: str) -> None:
    script = f'"$0" -m fastllama {arguments} | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: fastllama")


def test_result_drives_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\x1b]0;title\x07\ttext\n"
    print_result(text, end="")
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_result(text, end="")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07\ttext\n"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    # The next open file would otherwise take the number of stderr, and the error would go into it.
    script = f'"$0" -m fastllama train gone.toml {closed}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable], capture_output=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    (tmp_path / "text.txt").write_text("some text")
    script = f'"$0" -m fastllama tokenizer train --input text.txt --output tokenizer.json {closed}'
    subprocess.run(["bash", "-c", script, sys.executable], check=True, cwd=tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "data --help",
        "train --help",
        "train {recipe} --print-config",
        "data stats {data}",
    ],
)
@pytest.mark.parametrize("stdout", ["&-", "/dev/full"])
def test_lost_result_is_a_failure(workspace: Workspace, stdout: str, command: str) -> None:
    command = command.format(data=workspace.data, recipe=workspace.recipe)
    done = subprocess.run(
        ["bash", "-c", f'"$0" -m fastllama {command} >{stdout}', sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    why = "it is closed" if stdout == "&-" else "No space left on device"
    assert done.stderr == f"error: The output could not be written to stdout: {why}.\n"


FULL_STDOUT = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
# The reader of both streams goes away.
NO_READER = "read, write = os.pipe(); os.dup2(write, 1); os.dup2(write, 2); os.close(read)"


@pytest.mark.parametrize("code", [FULL_STDOUT, NO_READER])
def test_training_outlives_its_console(workspace: Workspace, tmp_path: Path, code: str) -> None:
    run = tmp_path / "run"
    done = train_in_child(
        workspace.recipe, "--run-dir", run, each_update=f"step == 2 and exec({code!r})"
    )
    assert done.returncode == 0, done.stderr
    assert list(losses(run)) == list(range(1, 11))
    assert (run / "checkpoints" / "latest").resolve().name == "step-00000010"
    if code == FULL_STDOUT:
        end = " lines for stdout could not be written: No space left on device\n"
        assert done.stderr.endswith(end)
        assert done.stderr.count("\n") == 1


def test_training_on_a_terminal_without_utf_8(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    run = tmp_path / "run"
    prompt = "na\u00efve \u65e5"
    options = ("--logging.sample-prompt", prompt, "--run-dir", run)
    done = train_in_child(workspace.recipe, *options)
    assert done.returncode == 0, done.stderr
    assert "na\\xefve \\u65e5" in done.stdout
    assert done.stdout.isascii()
    assert "\u65e5".encode("unicode_escape").decode() in (run / "samples.jsonl").read_text()
