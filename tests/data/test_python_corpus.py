import json
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
        "notes.txt": b"x",
        "site-packages/d.py": b"y = 1\n",
        "a/__pycache__/e.py": b"z = 1\n",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_sources_are_decoded_sorted_and_distinct(library: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "corpus.jsonl"
    assert python_corpus.write_corpus(output, library) == 2
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"path": "a/c.py", "text": "# -*- coding: latin-1 -*-\n# ü\n"},
        {"path": "b.py", "text": "# ü\nx = 1\n"},
    ]


def test_command_reuses_existing_output(
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "corpus.jsonl"
    monkeypatch.setattr(sys, "argv", ["python_corpus", "--output", str(output)])
    monkeypatch.setattr(python_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    python_corpus.main()
    assert "2 documents" in capsys.readouterr().out
    output.write_text("kept")
    python_corpus.main()
    assert "reused" in capsys.readouterr().out
    assert output.read_text() == "kept"
