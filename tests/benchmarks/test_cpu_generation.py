"""Both contenders of benchmarks/cpu_generation.py generate the same text."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import cpu_generation
from fastllama.weights.export import export
from tests.runs import train
from tests.workspace import Workspace


@pytest.mark.extra
def test_contenders_and_results(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers", reason="make test-all installs it")
    run, output = tmp_path / "run", tmp_path / "results.json"
    train(workspace.recipe, "--run-dir", run)
    export(run, tmp_path / "export", "float32")
    prompt = [5, 6, 7]
    ours = cpu_generation.of_fastllama(run, "float32", prompt)(16)
    assert ours == cpu_generation.of_transformers(tmp_path / "export", "float32", prompt)(16)
    sizes = ["--rounds", "2", "--prompt-tokens", "4", "--new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["", str(run), *sizes, "--output", str(output)])
    cpu_generation.main()
    results = json.loads(output.read_text())["first_token_seconds_and_tokens_per_s"]
    assert [len(found) for found in results.values()] == [2, 2, 2, 2]
    assert capsys.readouterr().out.count(" of transformers") == 8
