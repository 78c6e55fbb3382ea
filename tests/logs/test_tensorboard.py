"""Events of rows, read back with TensorBoard's own reader."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastllama.logs.sinks import MetricsLog
from fastllama.logs.tensorboard import event_log
from tests.logs.test_rows import row


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of a scalar's events."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def write_rows(run: Path, *steps: int, last_step: int = 0) -> None:
    log = MetricsLog(run, last_step, tensorboard=True, say=pytest.fail)
    for step in steps:
        log.write(row(step, loss=float(step), val_loss=3.0 if step == 2 else None))
    log.close()


def test_events_of_a_run_and_its_resume(tmp_path: Path) -> None:
    write_rows(tmp_path, 1, 2, 3)
    write_rows(tmp_path, 3, 4, last_step=2)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    # The events of update 3 in the first file are superseded.
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert scalars(tmp_path, "val_loss") == [(2, 3.0)]
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert {"lr", "tok_per_s", "skipped_steps"} < set(tags)
    assert not {"step", "progress", "eta_s", "peak_gib"} & set(tags)


def test_rows_that_wait_are_whole_events(tmp_path: Path) -> None:
    log, encode = event_log(tmp_path / "tensorboard", last_step=0)
    log.path.parent.rmdir()
    with pytest.raises(FileNotFoundError):
        log.write(encode(row(1)))
    log.path.parent.mkdir()
    log.write(encode(row(2)))
    assert [step for step, _ in scalars(tmp_path, "loss")] == [1, 2]
