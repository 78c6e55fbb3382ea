"""Appending to a log file."""

import os
import resource
from pathlib import Path

import pytest

from fastllama.logs import log_file
from fastllama.logs.log_file import LogFile, append, old_lines


def test_append_writes_the_whole_line_or_nothing(tmp_path: Path) -> None:
    log, limit = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    append(log, "first\n")
    # 10 bytes hold the first line and part of the second.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append(log, "second line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert log.read_text() == "first\n"


def test_append_never_leaves_the_folder_or_waits(tmp_path: Path) -> None:
    outside, link, pipe = (tmp_path / name for name in ("outside", "link", "pipe"))
    outside.touch()
    link.symlink_to(outside)
    os.mkfifo(pipe)
    for path in (link, pipe, tmp_path):
        with pytest.raises(OSError):  # noqa: PT011
            append(path, "line\n")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="not a regular file"):
        append(pipe, "line\n")
    os.close(reader)
    assert outside.read_text() == ""


def test_records_wait_for_the_disk(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "late" / "log", header=b"header\n")
    for number in range(2):
        with pytest.raises(FileNotFoundError):
            log.write(b"%d\n" % number)
    assert log.n_waiting == 2
    log.path.parent.mkdir()
    log.write(b"2\n")
    log.sync()
    assert (log.n_waiting, log.path.read_text()) == (0, "header\n0\n1\n2\n")


def test_log_that_is_too_large_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "MAX_BYTES", 4)
    path = tmp_path / "log"
    path.write_text("12345")
    said: list[str] = []
    assert old_lines(path, said.append) == []
    assert said == [f"{path} is larger than 4 bytes; it is kept as passed-over-log-1."]
    assert (tmp_path / "passed-over-log-1").read_text() == "12345"
