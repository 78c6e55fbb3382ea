"""Refused updates: every rank refuses them, and what they were trained on is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import fastllama.train as trainer
from fastllama.cli import main
from fastllama.config import load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.model.llama import Llama
from fastllama.training.skipped_steps import batch_record
from tests.workspace import Workspace

LAYOUTS = {"2 shards": (2, 1), "2 replicas": (2, 2), "2 replicas of 2 shards": (4, 2)}
"""Ranks and replicas."""
FAULTS = ("gradient of the last rank", "loss of all")


def test_the_batch_of_a_refused_update_is_kept(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real, step = tmp_path / "run", trainer.update, 0
    seen: list[torch.Tensor] = []
    forward = Llama.forward

    def remember(self: Any, inputs: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if self.training and step == 3:
            seen.append(inputs.clone())
        return forward(self, inputs, *rest, **options)

    def update(optimizer: Any, loss: Any, *rest: Any) -> Any:
        nonlocal step
        step += 1
        return real(optimizer, loss * float("nan") if step == 4 else loss, *rest)

    monkeypatch.setattr(Llama, "forward", remember)
    monkeypatch.setattr(trainer, "update", update)
    arguments = ["train", str(workspace.recipe), "--run-dir", str(run)]
    main([*arguments, "--logging.sample-interval", "0", "--training.eval-interval", "0"])
    (bad,) = map(json.loads, (run / "bad-updates.jsonl").read_text().splitlines())
    assert bad["step"] == 4
    assert bad["reason"] == "the loss or the gradient norm is not finite"
    assert bad["grad_norm"] > 0
    assert bad["positions"] == [24, 31]
    assert len(bad["sequences"]) == 8
    assert len(bad["texts"]) == 4
    tokenizer = Tokenizer.from_file(str(workspace.tokenizer))
    trained = torch.cat(seen)
    assert len(trained) == 8
    for text, inputs in zip(bad["texts"], trained, strict=False):
        # The text ends with one token more, the last target.
        assert text.startswith(tokenizer.decode(inputs.tolist(), skip_special_tokens=False)[:-1])


def test_batches_of_updates_that_are_done_again_move_aside(
    workspace: Workspace, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    main(["train", str(workspace.recipe), "--run-dir", str(run)])
    lines = [json.dumps({"step": step}) + "\n" for step in (4, 12)]
    (run / "bad-updates.jsonl").write_text("".join(lines))
    main(["train", "--resume", str(run), "--training.training-tokens", "2816"])
    assert (run / "bad-updates.jsonl").read_text() == lines[0]
    assert (run / "superseded-bad-updates.jsonl").read_text() == lines[1]


def test_later_epochs_find_their_sequences(workspace: Workspace) -> None:
    config = load_recipe(workspace.recipe)
    dataset = open_dataset(config)
    n_sequences = dataset.train.n_sequences(config.model.max_seq_len)
    updates = -(-n_sequences // config.sequences_per_update)
    ends = [step * config.sequences_per_update for step in range(1, updates + 1)]
    batches = [batch_record(end, config, dataset) for end in ends]
    sequences = [index for batch in batches for index in batch["sequences"]]
    assert sorted(sequences[:n_sequences]) == list(range(n_sequences))


def refuse(monkeypatch: pytest.MonkeyPatch, calls: range) -> None:
    """Have these of the updates that are tried go wrong, counted from 1."""
    real, call = trainer.update, 0

    def update(optimizer: Any, loss: Any, *rest: Any) -> Any:
        nonlocal call
        call += 1
        return real(optimizer, loss * float("nan") if call in calls else loss, *rest)

    monkeypatch.setattr(trainer, "update", update)


def test_goes_back_and_on_with_other_data(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = tmp_path / "run", []
    forward = Llama.forward

    def remember(self: Any, inputs: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if self.training:
            seen.append(inputs.clone())
        return forward(self, inputs, *rest, **options)

    monkeypatch.setattr(Llama, "forward", remember)
    refuse(monkeypatch, range(7, 10))
    arguments = ["train", str(workspace.recipe), "--run-dir", str(run)]
    arguments += ["--logging.sample-interval", "0", "--training.eval-interval", "0"]
    main([*arguments, "--training.rewind-after", "3"])
    # Back from update 9 to the checkpoint of update 5, and on after position 72 = 9 x 8.
    progress = json.loads((run / "checkpoints/latest/progress.json").read_text())["progress"]
    assert (progress["step"], progress["position"]) == (10, 72 + 5 * 8)
    assert (progress["skipped_steps"], progress["skipped_in_a_row"]) == (3, 0)
    config = load_recipe(workspace.recipe)
    dataset = open_dataset(config)
    wanted = batch_record(80, config, dataset)["sequences"]
    # Of 4 micro-batches an update; nine were done before.
    batch = torch.cat(seen[9 * 4 : 10 * 4])
    assert [dataset.train.read(index, 32).tolist()[:-1] for index in wanted] == batch.tolist()
    # Neither the good update 6 nor the refused ones are in the weights.
    state = load_file(next((run / "checkpoints/latest").glob("*.safetensors")))
    assert state["optimizer.step.norm.weight"].item() == 10
    rows = [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 11))
    again = (run / "superseded-metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in again] == [6, 7, 8, 9]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (range(2, 5), "updates 2 to 4 were skipped in a row, and there is no checkpoint before"),
        (range(7, 100), "after 3 rewinds to"),
    ],
)
def test_gives_up_where_going_back_does_not_help(
    calls: range,
    message: str,
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse(monkeypatch, calls)
    arguments = ["train", str(workspace.recipe), "--run-dir", str(tmp_path / "run")]
    arguments += ["--logging.sample-interval", "0", "--training.eval-interval", "0"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--training.rewind-after", "3"])
    assert stopped.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_all_ranks_refuse_what_one_does(workspace: Workspace, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(workspace.recipe), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    layouts = json.loads(done.stdout.splitlines()[-1])
    back = layouts.pop("back over 2 replicas of 2 shards")
    assert (back["step"], back["position"], back["skipped_steps"]) == (10, 72 + 5 * 8, 3)
    for layout, found in layouts.items():
        one, all_of_them = (found[fault] for fault in FAULTS)
        assert [row["skipped_steps"] for row in one] == [0] * 3 + [1] * 7, layout
        # To the bit: a rank that had applied its part would train on with another model.
        assert [row["loss"] for row in one] == [row["loss"] for row in all_of_them], layout
        assert one[-1]["loss"] < one[0]["loss"] - 0.5


def train_layouts(recipe: Path, folder: Path) -> dict[str, Any]:
    """The rows of a training over each layout with each fault in its fourth update."""
    from tests.ranks import launch

    found: dict[str, Any] = {}
    for layout, (world_size, replicate) in LAYOUTS.items():
        found[layout] = {}
        for fault in FAULTS:
            run = folder / f"{layout} {fault}".replace(" ", "-")
            arguments = ["train", recipe, "--run-dir", run, "--training.eval-interval", "0"]
            arguments += ["--logging.sample-interval", "0", "--parallel.replicate", str(replicate)]
            outcome = launch(
                world_size,
                arguments,
                run.with_suffix(".log"),
                prepare=lambda rank, fault=fault, last=world_size - 1: poison(fault, rank == last),
            )
            if set(outcome.codes) != {0}:
                raise RuntimeError(outcome.printed)
            rows = (run / "metrics.jsonl").read_text().splitlines()
            found[layout][fault] = [json.loads(row) for row in rows]
    run = folder / "back"
    arguments = ["train", recipe, "--run-dir", run, "--parallel.replicate", "2"]
    outcome = launch(
        4,
        [*arguments, "--training.rewind-after", "3"],
        run.with_suffix(".log"),
        prepare=lambda rank: poison("loss of all in a row", False),
    )
    if set(outcome.codes) != {0}:
        raise RuntimeError(outcome.printed)
    progress = json.loads((run / "checkpoints/latest/progress.json").read_text())["progress"]
    return found | {"back over 2 replicas of 2 shards": progress}


def poison(fault: str, is_last_rank: bool) -> None:
    """Have the fourth update of this rank go wrong, or the seventh and two after it."""
    real, step = trainer.update, 0

    def update(optimizer: Any, loss: Any, *rest: Any) -> Any:
        nonlocal step
        step += 1
        bad = {"loss of all": range(4, 5), "loss of all in a row": range(7, 10)}
        if step in bad.get(fault, ()):
            loss = loss * float("nan")
        elif step == 4 and is_last_rank:
            gradient = optimizer.param_groups[0]["params"][0].grad.to_local()
            gradient.view(-1)[0] = float("nan")
        return real(optimizer, loss, *rest)

    trainer.update = update


if __name__ == "__main__":
    print(json.dumps(train_layouts(Path(sys.argv[1]), Path(sys.argv[2]))))
