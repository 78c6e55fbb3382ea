"""Arguments for which tyro's own rules do not fit."""

import gc
import io
import sys
from pathlib import Path

import pytest

from fastllama.cli import main
from fastllama.cli.errors import UsageError
from fastllama.cli.parsing import parse, split_options, whole_number
from fastllama.cli.prepare import PrepareOptions
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


def test_process_seldom_looks_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_threshold()
    try:
        for argv, expected in ((["--version"], before[0]), (None, 100_000)):
            monkeypatch.setattr(sys, "argv", ["fastllama", "--version"])
            main(argv)
            assert gc.get_threshold() == (expected, *before[1:])
    finally:
        gc.set_threshold(*before)


def test_value_that_looks_like_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "generate", "gone", "--prompt", "-the end")
    assert "if '-the end' is the value, write --prompt='-the end'." in message
    message = refusal(capsys, "generate", "gone", "--prompt", "--the end")
    assert "Expected 1 value; if '--the end' is the value, write --prompt='--the end'." in message
    for arguments in (["--prompt"], ["--prompt", "--seed", "3"]):
        message = refusal(capsys, "generate", "gone", *arguments)
        assert "Expected 1 value; see fastllama generate --help" in message


@pytest.mark.parametrize("command", ["prepare --tokenizer t.json", "tokenizer train"])
def test_input_without_a_file(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    # As `--input $FILES` is, where FILES is not set.
    message = refusal(capsys, *command.split(), "--input", "--output", "x")
    assert "--input has no value; name at least one" in message


def test_true_and_false_stay_strings_in_string_options(workspace: Workspace) -> None:
    args = "--run-dir true --logging.sample-prompt true --data.path=false --training.compile true"
    args += " --logging.tensorboard=true --parallel.reshard_after_forward false"
    options, path, _ = parse_train([str(workspace.recipe), *split_options(args.split())])
    config = options.config
    assert path == Path("true")
    assert (config.logging.sample_prompt, config.data.path) == ("true", "false")
    assert config.training.compile is config.logging.tensorboard is True
    assert config.parallel.reshard_after_forward is False


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["training.batch_size=4"], "options have dashes: --training.batch-size 4"),
        (["{recipe}", "training.batch_size=4"], "have dashes: --training.batch-size 4"),
        (["{recipe}", "--batch_size", "4"], "--batch_size; did you mean training.batch_size?"),
        (["{recipe}", "--lr", "1e-3"], "did you mean optimizer.max_lr?"),
        (["{recipe}", "--learning-rate", "1e-3"], "did you mean optimizer.max_lr?"),
        (["{recipe}", "--max_steps", "5"], "did you mean training.training_tokens?"),
        (["{recipe}", "--output_dir", "x"], "did you mean --run-dir?"),
        (["{recipe}", "--resum", "x"], "did you mean --resume?"),
        (["{recipe}", "--model.hidden-size", "8"], "did you mean model.n_embd?"),
        (["{recipe}", "runs/x"], "'runs/x' is no option"),
        (["{recipe}", "--data.sources", "x"], "as [[data.sources]]; --data.sources.0.weight ch"),
        (["{recipe}", "--data.stages=x"], "as [[data.stages]]; --data.stages.0.max-seq-len ch"),
        (["{recipe}", "--data.stages.0.theta", "5"], "has no entries; there is no data.stages.0."),
        (["{recipe}", "--training.seed", str(10**30)], "training.seed must be at most"),
        (["{recipe}", "--logging.sample-prompt", "caf\udce9"], "is not valid UTF-8"),
    ],
)
def test_a_newcomer_is_told_our_name(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    given = [arg.format(recipe=workspace.recipe) for arg in args]
    assert message in refusal(capsys, "train", *given)


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("1e9", "1000000000"),
        ("1.28e3", "1280"),
        ("2**19", "524288"),
        ("1_000", "1000"),
        ("5.0", "5"),
        ("-3", "-3"),
        ("1.5", "1.5"),
        ("1e-3", "1e-3"),
        ("2**x", "2**x"),
        ("", ""),
    ],
)
def test_whole_numbers(text: str, digits: str) -> None:
    assert whole_number(text) == digits


def test_whole_numbers_of_any_command(workspace: Workspace) -> None:
    args = ["--training.training-tokens", "1.28e3", "--training.tokens-per-update=2**8"]
    options, *_ = parse_train([str(workspace.recipe), *split_options(args)])
    training = options.config.training
    assert (training.training_tokens, training.tokens_per_update) == (1280, 256)


def test_empty_path_is_an_error(workspace: Workspace) -> None:
    with pytest.raises(UsageError, match="--run-dir is empty; name a path"):
        parse_train([str(workspace.recipe), "--run-dir", ""])


def test_output_is_on_a_disk(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--output s3://b/q is a URL; name a path on a disk\."):
        parse(PrepareOptions, ["--output", "s3://b/q"], "fastllama prepare")
    with pytest.raises(UsageError, match=r"s3://b/q is a URL; .* checkpoint\.upload takes a URL"):
        parse_train([str(workspace.recipe), "--run-dir", "s3://b/q"])
    # A folder with such a name is one.
    (tmp_path / "s3:" / "b").mkdir(parents=True)
    assert parse_train([str(workspace.recipe), "--run-dir", "s3://b"])[1] == Path("s3:/b")


def test_home_folder(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    _, path, _ = parse_train([str(workspace.recipe), *split_options(["--run-dir=~/runs/a"])])
    assert path == Path("/home/ada/runs/a")
    args = [str(workspace.recipe), "--logging.sample-prompt", "~/x"]
    assert parse_train(args)[0].config.logging.sample_prompt == "~/x"


@pytest.mark.parametrize("args", [["data"], ["data", "--help"], ["data", "-h"]])
def test_the_first_word_of_a_command_explains_itself(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(args)
    printed = capsys.readouterr().out
    assert printed.startswith("usage: fastllama data COMMAND")
    assert "fastllama data check data/NAME" in printed
    assert "fastllama train" not in printed


def test_prompt_that_is_not_utf8(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(capsys, "generate", "gone", "--prompt", "caf\udce9")
    assert "The text of --prompt" in message
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    message = refusal(capsys, "generate", "gone", "--prompt", "-")
    assert "Standard input is not UTF-8 text: byte 3 is 0xe9" in message


def test_seed_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--seed must be at least 0" in refusal(capsys, "generate", "gone", "--seed", "2**63")
