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
    assert "is not a run folder" in refusal(capsys, "generate", tmp_path)
