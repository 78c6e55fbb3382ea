import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastllama.data import python_corpus


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    files = {
        "b.py": "# ü\nx = 1\n".encode(),
        "a/c.py": b"# -*- coding: latin-1 -*-\n# \xfc\n",
        "same.py": "# ü\nx = 1\n".encode(),
        "empty.py": b"",
        "undecodable.py": b"# \xff\n",
        "unknown.py": b"# coding: nonsense\n",
        "not-text.py": b"# coding: rot13\n",
        "notes.txt": b"x",
        "site-packages/d.py": b"y = 1\n",
        "a/__pycache__/e.py": b"z = 1\n",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.mkfifo(folder / "fifo.py")
    (folder / "folder.py").mkdir()
    return folder


def test_sources_are_decoded_sorted_and_distinct(library: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "corpus.jsonl"
    assert python_corpus.write_corpus(output, library) == (2, 3)
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"path": "a/c.py", "text": "# -*- coding: latin-1 -*-\n# ü\n"},
        {"path": "b.py", "text": "# ü\nx = 1\n"},
    ]


def test_command_reuses_existing_output(
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "corpus.jsonl"
    monkeypatch.setattr(sys, "argv", ["python_corpus", "--output", str(output)])
    monkeypatch.setattr(python_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    python_corpus.main()
    printed = capfd.readouterr().out
    assert "2 documents" in printed
    assert "3 files left out that are not text" in printed
    output.write_text("kept")
    python_corpus.main()
    assert "reused" in capfd.readouterr().out
    assert output.read_text() == "kept"


@pytest.mark.parametrize("stdout", [">/dev/full", ">&-", "| true"])
def test_console_that_fails_ends_nothing(library: Path, tmp_path: Path, stdout: str) -> None:
    program = f"""
import sys, sysconfig, time
sysconfig.get_paths = lambda: {{"stdlib": {str(library)!r}}}
time.sleep(0.1)  # Until the reader of a pipe is gone.
from fastllama.data.python_corpus import main
main()
"""
    output = tmp_path / "corpus.jsonl"
    shell = f'set -o pipefail; "$0" -c "$1" --output "$2" {stdout}'
    for _ in ("written", "reused"):
        command = ["bash", "-c", shell, sys.executable, program, str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "is not a file"), ("file/x.jsonl", "cannot be written: ")],
)
def test_output_that_cannot_be_written(
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    reason: str,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["python_corpus", "--output", str(tmp_path / name)])
    monkeypatch.setattr(python_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    with pytest.raises(SystemExit) as caught:
        python_corpus.main()
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err
