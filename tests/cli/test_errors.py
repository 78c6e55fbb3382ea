"""Exit codes, the error line, and `--debug`."""

import errno
import os
from pathlib import Path

import pytest

from fastllama.cli import main
from fastllama.cli.errors import FAILED, INTERRUPTED, MISTAKE, exit_code, report
from fastllama.distributed.failure_reports import report_to_torchrun
from fastllama.errors import TrainingFailedError
from tests.cli.refusal import refusal


def test_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastllama.cli.run_command", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["train", "recipe.toml"])
    assert stop.value.code == INTERRUPTED


@pytest.mark.parametrize(
    ("error", "code", "local_rank_1_prints"),
    [
        (ValueError("a mistake"), MISTAKE, False),
        (FileNotFoundError("no such file"), MISTAKE, True),
        (OSError("disk full"), FAILED, True),
        (TrainingFailedError("out of memory"), FAILED, True),
    ],
)
def test_exit_code_and_error_line(
    error: Exception,
    code: int,
    local_rank_1_prints: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = f"error: {error}\n"
    assert report(error, debug=False) == code
    assert capsys.readouterr().err == line
    for variable, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        # Without all of them, they are left over from another command.
        assert report(error, debug=False) == code
        assert capsys.readouterr().err == line
        monkeypatch.setenv(variable, value)
    assert report(error, debug=False) == code
    assert capsys.readouterr().err == (line if local_rank_1_prints else "")
    assert report(error, debug=False, of_training=False) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("number", "code", "remedy"),
    [
        (errno.ENOENT, MISTAKE, "No such file or directory; restore it, or name another path"),
        (errno.ENOTDIR, MISTAKE, "Not a directory; name a path below a folder"),
        (errno.EISDIR, MISTAKE, "Is a directory; name a file, not a folder"),
        (errno.EEXIST, MISTAKE, "File exists; move it elsewhere, or choose another path"),
        (errno.EACCES, MISTAKE, "Permission denied; choose another path, or"),
        (errno.EROFS, MISTAKE, "Read-only file system; choose a path on a disk that can be"),
        (errno.ENAMETOOLONG, MISTAKE, "File name too long; choose a shorter name"),
        (errno.ELOOP, MISTAKE, "Too many levels of symbolic links; the links lead in a circle"),
        (errno.ENOSPC, FAILED, "No space left on device; free space on the disk"),
        (errno.EMFILE, FAILED, "Too many open files; raise the limit of open files with ulimit -n"),
        (errno.EDQUOT, FAILED, "Disk quota exceeded; free space in your quota"),
        (errno.ESTALE, FAILED, "Stale file handle; mount the network file system again"),
        (errno.EIO, FAILED, "Input/output error; check the disk"),
        (errno.ENXIO, FAILED, "No such device or address; check the disk or the network"),
    ],
)
@pytest.mark.parametrize("path", ["a b\x1b", b"a b\x1b", Path("a b\x1b")])
def test_error_of_the_system(
    number: int, code: int, remedy: str, path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(OSError(number, os.strerror(number), path), debug=False) == code
    assert capsys.readouterr().err.startswith(f"error: a b\\x1b: {remedy}")


def test_error_of_the_system_with_two_paths_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    report(OSError(errno.EIO, "Input/output error", "a", None, "b"), debug=False)
    report(OSError(errno.EIO, "Input/output error", 3), debug=False)
    assert capsys.readouterr().err == (
        "error: a -> b: Input/output error; check the disk\n"
        "error: Input/output error; check the disk\n"
    )


@pytest.mark.parametrize(("given", "code"), [(7, 7), (0, FAILED), (None, FAILED), ("no", FAILED)])
def test_exit_code_of_a_rank_that_calls_sys_exit(given: object, code: int) -> None:
    assert exit_code(SystemExit(given)) == code


def test_current_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert "The current folder cannot be used (No such file" in refusal(capsys, "train", "a.toml")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no command 'trian'" in refusal(capsys, "trian")
    assert "There is no command 'data chekc'" in refusal(capsys, "data", "chekc", "data/mine")


def test_first_word_of_a_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["data"], ["data", "--help"]):
        main(arguments)
        assert "fastllama data check data/NAME" in capsys.readouterr().out


def test_error_drives_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("\x1b]0;title\x07 of\na file")
    report(error, debug=False)
    assert capsys.readouterr().err == "error: \\x1b]0;title\\x07 of a file\n"
    report(error, debug=True)
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    assert printed.startswith("ValueError: ")


def test_report_to_torchrun_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full")
    report_to_torchrun("a sentence")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_adds_traceback(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "gone.toml"]
    plain = refusal(capsys, *args)
    args.insert(place, "--debug")
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    first, *_, last = capsys.readouterr().err.splitlines(keepends=True)
    assert first == "Traceback (most recent call last):\n"
    assert last == plain
