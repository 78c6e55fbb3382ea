"""Skipped updates: the count, the record of their batches, rewinding, and all ranks skipping."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import fastllama.train as trainer
from fastllama.checkpoints.state import TrainProgress
from fastllama.config import load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.model.llama import Llama
from fastllama.run_folder import RunFolder
from fastllama.training import batches
from fastllama.training.batches import batch_record, end_position
from tests.config.with_options import with_options
from tests.runs import make_losses_nan, rows, train, train_in_child
from tests.workspace import Workspace

LAYOUTS = {"2 shards": (2, 1), "2 replicas": (2, 2), "2 replicas of 2 shards": (4, 2)}
"""Ranks and replicas."""
FAULTS = ("NaN gradient on the last rank", "NaN loss on all ranks")
QUIET = ("--logging.sample-interval", "0", "--training.eval-interval", "0")


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_progress(run: Path) -> dict[str, Any]:
    """The progress in the newest checkpoint."""
    content = json.loads((run / "checkpoints" / "latest" / "progress.json").read_text())
    return dict(content["progress"])


def record_inputs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The inputs of every micro-batch trained on from now on."""
    seen: list[torch.Tensor] = []
    forward = Llama.forward

    def recording_forward(self: Any, inputs: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if self.training:
            seen.append(inputs.clone())
        return forward(self, inputs, *rest, **options)

    monkeypatch.setattr(Llama, "forward", recording_forward)
    return seen


def test_nan_loss_is_skipped_and_counted(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    nan = "loss = loss * float('nan') if step == 4 else loss"
    done = train_in_child(workspace.recipe, "--run-dir", run, each_update=nan)
    assert done.returncode == 0, done.stderr
    assert "positions 24 to 31 of the data order" in " ".join(done.stdout.split())
    assert [row["skipped_steps"] for row in rows(run)] == ["0"] * 3 + ["1"] * 7
    # A row has the loss of the forward, before the fault.
    assert all(math.isfinite(float(row["loss"])) for row in rows(run))


def test_too_many_skipped_updates_in_a_row_end_the_run(
    workspace: Workspace, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    infinite = "loss = loss * float('inf') if step > 5 else loss"
    options = ["--run-dir", run, "--training.max-bad-updates", 3]
    done = train_in_child(workspace.recipe, *options, each_update=infinite)
    assert done.returncode == 1
    assert "The last 3 updates were all skipped" in done.stderr
    assert "positions 56 to 63 of the data order" in done.stderr
    assert "The weights are those of update 5" in done.stderr
    assert "Traceback" not in done.stderr
    assert (run / "checkpoints" / "latest").resolve().name == "step-00000005"


def test_batch_of_a_skipped_update_is_recorded(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = tmp_path / "run", record_inputs(monkeypatch)
    make_losses_nan(monkeypatch, [4])
    train(workspace.recipe, "--run-dir", run, *QUIET)
    (bad,) = json_lines(run / "bad-updates.jsonl")
    assert bad["step"] == 4
    assert bad["reason"] == "the loss or the gradient norm is not finite"
    assert bad["grad_norm"] > 0
    assert bad["positions"] == [24, 31]
    assert len(bad["sequences"]) == 8
    assert len(bad["texts"]) == 4
    tokenizer = Tokenizer.from_file(str(workspace.tokenizer))
    # Update 4 is micro-batches 13 to 16, of 2 sequences each.
    batch = torch.cat(seen[12:16])
    assert len(batch) == 8
    for text, inputs in zip(bad["texts"], batch, strict=False):
        # The text has one token more than the inputs, the last target.
        assert text.startswith(tokenizer.decode(inputs.tolist(), skip_special_tokens=False)[:-1])


def test_records_of_repeated_updates_are_moved(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    lines = [json.dumps({"step": step}) + "\n" for step in (4, 12)]
    (run / "bad-updates.jsonl").write_text("".join(lines))
    train("--resume", run, "--training.training-tokens", 11 * 256)
    assert (run / "bad-updates.jsonl").read_text() == lines[0]
    assert (run / "superseded-bad-updates.jsonl").read_text() == lines[1]


def test_batch_records_of_an_epoch_name_every_sequence(workspace: Workspace) -> None:
    config = load_recipe(workspace.recipe)
    dataset = open_dataset(config)
    n_sequences = dataset.sources[0].stream.n_sequences(config.model.max_seq_len)
    updates = -(-n_sequences // config.sequences_per_update)
    batches = [
        batch_record(step, step * config.sequences_per_update, config, dataset)
        for step in range(1, updates + 1)
    ]
    sequences = [index for batch in batches for index in batch["sequences"]]
    assert sorted(sequences[:n_sequences]) == list(range(n_sequences))


def test_rewind_resumes_with_the_data_after_the_series(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = tmp_path / "run", record_inputs(monkeypatch)
    make_losses_nan(monkeypatch, range(7, 10))
    train(workspace.recipe, "--run-dir", run, *QUIET, "--training.rewind-after", 3)
    # After update 9, at position 9 x 8 = 72, the run rewinds to the checkpoint of update 5.
    progress = saved_progress(run)
    assert (progress["step"], progress["position"]) == (10, 72 + 5 * 8)
    assert (progress["skipped_steps"], progress["skipped_in_a_row"]) == (3, 0)
    config = load_recipe(workspace.recipe)
    dataset = open_dataset(config)
    expected = batch_record(7, 80, config, dataset)["sequences"]
    # The tenth update that was computed, of 4 micro-batches.
    batch = torch.cat(seen[9 * 4 : 10 * 4])
    stream = dataset.sources[0].stream
    assert [stream.read(index, 32).tolist()[:-1] for index in expected] == batch.tolist()
    assert end_position(RunFolder(run), config, 10) == 112
    # Checkpoints of the updates 5 and 10 are kept. The update after the rewind read 72 to 79.
    assert end_position(RunFolder(run), config, 6) == 80
    assert end_position(RunFolder(run), config, 5) == 40
    # AdamW's count has neither the discarded update 6 nor the skipped updates 7 to 9.
    state = load_file(next((run / "checkpoints/latest").glob("*.safetensors")))
    assert state["optimizer.step.norm.weight"].item() == 10
    assert [row["step"] for row in json_lines(run / "metrics.jsonl")] == list(range(1, 11))
    superseded = json_lines(run / "superseded-metrics.jsonl")
    assert [row["step"] for row in superseded] == [6, 7, 8, 9]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (range(2, 5), "updates 2 to 4 were skipped in a row, and there is no checkpoint before"),
        (range(7, 100), "after 3 rewinds to"),
    ],
)
def test_rewind_gives_up(
    calls: range,
    message: str,
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_losses_nan(monkeypatch, calls)
    options = ["--run-dir", tmp_path / "run", *QUIET, "--training.rewind-after", 3]
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, *options)
    assert stop.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())


# Half a minute. In `make test` one rank skips, and tests/test_elastic.py has several.
@pytest.mark.slow
def test_all_ranks_skip_together(workspace: Workspace, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(workspace.recipe), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    progress = results["rewound"]
    assert (progress["step"], progress["position"]) == (10, 72 + 5 * 8)
    assert progress["skipped_steps"] == 3
    assert results["layouts"].keys() == LAYOUTS.keys()
    for layout, by_fault in results["layouts"].items():
        one_rank, all_ranks = (by_fault[fault] for fault in FAULTS)
        assert [row["skipped_steps"] for row in one_rank] == [0] * 3 + [1] * 7, layout
        # Bit-equal: a rank that had applied its part would train another model from then on.
        assert [row["loss"] for row in one_rank] == [row["loss"] for row in all_ranks], layout
        assert one_rank[-1]["loss"] < one_rank[0]["loss"] - 0.5


def train_layouts(recipe: Path, folder: Path) -> dict[str, Any]:
    """Train over each layout with each fault in update 4, and once with a rewind.

    Returns:
        "layouts": the rows by layout and fault; "rewound": the progress of the rewound run.
    """
    from tests.ranks import launch

    def run_ranks(run: Path, world_size: int, fault: str, *options: str) -> None:
        outcome = launch(
            world_size,
            ["train", recipe, "--run-dir", run, *options],
            run.with_suffix(".log"),
            prepare=lambda rank: inject(fault, is_last_rank=rank == world_size - 1),
        )
        if set(outcome.codes) != {0}:
            raise RuntimeError(outcome.printed)

    by_layout: dict[str, Any] = {}
    for layout, (world_size, replicate) in LAYOUTS.items():
        by_layout[layout] = {}
        for fault in FAULTS:
            run = folder / f"{layout} {fault}".replace(" ", "-")
            run_ranks(run, world_size, fault, *QUIET, "--parallel.replicate", str(replicate))
            by_layout[layout][fault] = json_lines(run / "metrics.jsonl")
    run = folder / "rewound"
    options = ["--parallel.replicate", "2", "--training.rewind-after", "3"]
    run_ranks(run, 4, "NaN loss in updates 7 to 9", *options)
    return {"layouts": by_layout, "rewound": saved_progress(run)}


def inject(fault: str, is_last_rank: bool) -> None:
    """Put a fault into the updates of this rank: update 4, or updates 7 to 9."""
    original, step = trainer.update, 0
    nan_losses = {"NaN loss on all ranks": [4], "NaN loss in updates 7 to 9": [7, 8, 9]}

    def update(optimizer: Any, loss: Any, *rest: Any) -> Any:
        nonlocal step
        step += 1
        if step in nan_losses.get(fault, ()):
            loss = loss * float("nan")
        elif fault == "NaN gradient on the last rank" and step == 4 and is_last_rank:
            gradient = optimizer.param_groups[0]["params"][0].grad.to_local()
            gradient.view(-1)[0] = float("nan")
        return original(optimizer, loss, *rest)

    trainer.update = update


if __name__ == "__main__":
    print(json.dumps(train_layouts(Path(sys.argv[1]), Path(sys.argv[2]))))


def test_end_position_is_unknown_where_a_rewind_is_not_on_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of the updates 4 and 9, and a rewind by two updates between them. Every update was saved.
    saved = {Path("a"): TrainProgress(step=4, position=32), Path("b"): TrainProgress(9, 88)}
    monkeypatch.setattr(batches, "complete_checkpoints", lambda folder: list(saved))
    monkeypatch.setattr(batches, "read_progress", saved.__getitem__)
    run = RunFolder(Path("run"))
    config = with_options(
        model__max_seq_len=32, training__tokens_per_update=256, checkpoint__interval_tokens=256
    )
    assert end_position(run, config, 3) == 24
    with pytest.raises(ValueError, match="rewound between the updates 4 and 9, and no checkpoint"):
        end_position(run, config, 6)
    # Saved every five updates, the run can only have gone back to update 4.
    config = replace(config, checkpoint=replace(config.checkpoint, interval_tokens=5 * 256))
    saved[Path("b")] = TrainProgress(5, 56)
    assert end_position(run, config, 5) == 56
