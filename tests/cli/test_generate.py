"""`fastllama generate`: its options; tests/cli/test_pipeline.py generates text."""

from pathlib import Path

import pytest

from fastllama.cli.generate import GenerateOptions
from fastllama.cli.parsing import parse
from fastllama.inference.sampling import Sampling
from tests.cli.refusal import refusal


def test_sampling_options_have_no_prefix() -> None:
    given = "--max-new-tokens 7 --temperature 0 --top-k 3 --top-p 0.5 --seed 11"
    options = parse(GenerateOptions, ["runs/x", *given.split()], "fastllama generate")
    assert options.sampling == Sampling(7, temperature=0.0, top_k=3, top_p=0.5, seed=11)
    assert parse(GenerateOptions, ["runs/x"], "fastllama generate").sampling == Sampling()


def test_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it has no config.toml; see" in refusal(capsys, "generate", tmp_path)
    gone = tmp_path / "gone"
    assert f"{gone} is not a run folder: it does not" in refusal(capsys, "generate", gone)
    (tmp_path / "config.json").write_text("{}")
    message = refusal(capsys, "generate", tmp_path)
    assert f"make a run of it with fastllama import {tmp_path} --output runs/NAME." in message
