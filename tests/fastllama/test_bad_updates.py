"""Refused updates: every rank refuses them, and what they were trained on is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import fastllama.train as trainer
from fastllama.bad_updates import batch_of
from fastllama.cli import main
from fastllama.config import load_recipe
from fastllama.data.dataset import open_dataset
from tests.fastllama.conftest import Workspace

LAYOUTS = {"2 shards": (2, 1), "2 replicas": (2, 2), "2 replicas of 2 shards": (4, 2)}
"""Ranks and replicas."""
FAULTS = ("gradient of the last rank", "loss of all")


def test_the_batch_of_a_refused_update_is_kept(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real, step = tmp_path / "run", trainer.update, 0
    seen: list[torch.Tensor] = []
    forward = trainer.Llama.forward

    def remember(self: Any, inputs: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if self.training and step == 3:
            seen.append(inputs.clone())
        return forward(self, inputs, *rest, **options)

    def update(optimizer: Any, loss: Any, *rest: Any) -> Any:
        nonlocal step
        step += 1
        return real(optimizer, loss * float("nan") if step == 4 else loss, *rest)

    monkeypatch.setattr(trainer.Llama, "forward", remember)
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
    batches = [batch_of(step, config, dataset) for step in range(1, updates + 1)]
    sequences = [index for batch in batches for index in batch["sequences"]]
    assert sorted(sequences[:n_sequences]) == list(range(n_sequences))


def test_all_ranks_refuse_what_one_does(workspace: Workspace, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(workspace.recipe), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    for layout, found in json.loads(done.stdout.splitlines()[-1]).items():
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
    return found


def poison(fault: str, is_last_rank: bool) -> None:
    """Have the fourth update of this rank go wrong."""
    real, step = trainer.update, 0

    def update(optimizer: Any, loss: Any, *rest: Any) -> Any:
        nonlocal step
        step += 1
        if step == 4 and fault == "loss of all":
            loss = loss * float("nan")
        elif step == 4 and is_last_rank:
            gradient = optimizer.param_groups[0]["params"][0].grad.to_local()
            gradient.view(-1)[0] = float("nan")
        return real(optimizer, loss, *rest)

    trainer.update = update


if __name__ == "__main__":
    print(json.dumps(train_layouts(Path(sys.argv[1]), Path(sys.argv[2]))))
