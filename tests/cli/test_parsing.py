"""Arguments for which tyro's own rules do not fit."""

from pathlib import Path

import pytest

from fastllama.cli.parsing import split_options
from fastllama.cli.train import parse_train
from tests.cli.refusal import refusal
from tests.workspace import Workspace


def test_missing_and_unknown_options(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--input" in refusal(capsys, "prepare", "--output", "x")
    assert "Unknown option --inptu" in refusal(
        capsys, "tokenizer", "train", "--input", workspace.corpus, "--inptu", "x"
    )


def test_debug_is_not_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    # If --debug were removed here, `hello` would become the prompt.
    args = ["generate", "gone", "--prompt", "--debug", "hello"]
    assert "Missing value for argument '--prompt'" in refusal(capsys, *args)
    assert "gone is not a run folder" in refusal(capsys, "generate", "gone", "--prompt=--debug")


def test_true_and_false_stay_strings_in_string_options(workspace: Workspace) -> None:
    args = "--run-dir true --logging.sample-prompt true --data.path=false --training.compile true"
    args += " --logging.tensorboard=true --parallel.reshard_after_forward false"
    options, path = parse_train([str(workspace.recipe), *split_options(args.split())])
    config = options.config
    assert path == Path("true")
    assert (config.logging.sample_prompt, config.data.path) == ("true", "false")
    assert config.training.compile is config.logging.tensorboard is True
    assert config.parallel.reshard_after_forward is False
