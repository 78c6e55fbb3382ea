"""fastllama merge: averages against float64, and what cannot be averaged."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastllama.cli import main
from tests.runs import train
from tests.workspace import Workspace

STEPS = ("step-00000005", "step-00000010")


@pytest.fixture(scope="module")
def run(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 updates with checkpoints after 5 and 10."""
    run = tmp_path_factory.mktemp("merged") / "run"
    train(workspace.recipe, "--run-dir", run)
    return run


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: value for name, value in found.items() if name.startswith("model.")}


def merge(*arguments: object) -> None:
    main(["merge", *map(str, arguments)])


@pytest.mark.parametrize(
    ("given", "shares"), [([], [0.5, 0.5]), (["--weights", 1, 3], [0.25, 0.75])]
)
def test_average_is_that_of_float64(
    given: list[object],
    shares: list[float],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoints, merged = [run / "checkpoints" / step for step in STEPS], tmp_path / "merged"
    merge(*checkpoints, "--output", merged, *given)
    printed = capsys.readouterr().out
    for share, checkpoint in zip(shares, checkpoints, strict=True):
        assert f"{100 * share:5.1f} % {checkpoint}\n" in printed
    found = weights(merged / "checkpoints" / "step-00000000")
    parts = [weights(checkpoint) for checkpoint in checkpoints]
    assert found.keys() == parts[0].keys()
    for name, value in found.items():
        exact = sum(share * part[name].double() for share, part in zip(shares, parts, strict=True))
        assert isinstance(exact, torch.Tensor)
        # Rounded once.
        assert torch.equal(value, exact.float())


def test_merged_run_generates_and_starts_others(
    run: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    # A run folder is its newest checkpoint.
    merge(run, run / "checkpoints" / STEPS[0], "--output", merged)
    capsys.readouterr()
    main(["generate", str(merged), "--prompt", "def "])
    assert capsys.readouterr().out.startswith("def ")
    train(workspace.recipe, "--run-dir", tmp_path / "next", "--training.init-from", merged)
    with pytest.raises(SystemExit) as stop:
        train("--resume", merged)
    assert stop.value.code == 2
    assert f"--training.init-from {merged}" in capsys.readouterr().err


def test_sentencepiece_model_of_the_first_run_is_kept(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=True)
    (other / "tokenizer.model").write_bytes(b"\xff")
    merge(other, run, "--output", tmp_path / "with")
    assert (tmp_path / "with" / "tokenizer.model").read_bytes() == b"\xff"
    merge(run, other, "--output", tmp_path / "without")
    assert not (tmp_path / "without" / "tokenizer.model").exists()


def test_refusals(
    run: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (run / "checkpoints" / step for step in STEPS)
    damaged, wide = tmp_path / "damaged", tmp_path / "wide"
    shutil.copytree(run, damaged, symlinks=True)
    next((damaged / "checkpoints" / STEPS[0]).glob("*.safetensors")).write_bytes(b"")
    train(workspace.recipe, "--run-dir", wide, "--model.ffn-hidden", 48)
    gone = run / "checkpoints" / "step-00000007"
    cases: dict[tuple[object, ...], str] = {
        (first,): "needs at least two checkpoints",
        (first, second, "--weights", 1): "There are 2 checkpoints and 1 weights; give one for each",
        (first, second, "--weights", 1, -1): "The weights sum to 0.0; give finite numbers",
        (first, second, "--weights", 1, "nan"): "The weights sum to nan; give finite numbers",
        (first, gone): f"There is no checkpoint {gone}",
        (first, tmp_path): f"{tmp_path} is not a run folder: it has no config.toml",
        (first, damaged / "checkpoints" / STEPS[0]): "The checkpoint is damaged: ",
        (first, wide): "has model.ffn_hidden = 48, and ",
    }
    for arguments, expected in cases.items():
        with pytest.raises(SystemExit) as stop:
            merge(*arguments, "--output", tmp_path / "merged")
        assert stop.value.code == 2, arguments
        assert expected in capsys.readouterr().err
        assert {path.name for path in tmp_path.iterdir()} == {"damaged", "wide"}
    with pytest.raises(SystemExit):
        merge(first, second, "--output", wide)
    assert f"output {wide} exists" in capsys.readouterr().err
