"""A row as a line on the console."""

import math

import pytest

from fastllama.logs.rows import Row, duration, human


def row(step: int, loss: float = 2.0, val_loss: float | None = None) -> Row:
    return Row(
        step=step,
        tokens=1024 * step,
        tokens_total=10**7 + 1024 * step,
        loss=loss,
        perplexity=math.exp(loss),
        lr=3e-4,
        grad_norm=0.5,
        tok_per_s=12345.6,
        time_s=3723.0,
        data_wait_s=0.25,
        skipped_steps=0,
        progress=0.125,
        eta_s=59.7,
        val_loss=val_loss,
        val_bits_per_byte=None if val_loss is None else val_loss / 4,
    )


def test_console_line() -> None:
    line = row(7).line()
    assert line == (
        "step 7   12.5%  loss 2.0000  ppl 7.4  lr 3.00e-04  gnorm 0.50  tok 10.0M  "
        "12,346 tok/s  1:02:03  eta 1:00  wait 0.25s"
    )


def test_console_line_with_optional_values() -> None:
    full = row(7, val_loss=3.0)
    full.skipped_steps, full.mfu_causal, full.mfu_palm, full.peak_gib = 2, 0.4, 0.45, 71.26
    assert full.line().startswith(row(7).line())
    assert full.line().endswith(
        "mfu 40.0% causal 45.0% palm  peak 71.3 GiB  skipped 2  val 3.0000 (0.750 bits/byte)"
    )


def test_console_line_names_a_slow_rank() -> None:
    slow = row(7)
    slow.slow_rank, slow.slow_rank_share = 5, 0.123
    assert slow.line() == row(7).line() + "  waits for rank 5 12%"
    slow.slow_rank_share = 0.04
    assert slow.line() == row(7).line()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (9_216, "9,216"),
        (102_400, "102.4k"),
        (1_000_000, "1.0M"),
        (1_300_000_000, "1.3B"),
        (15 * 10**12, "15.0T"),
    ],
)
def test_human(count: int, text: str) -> None:
    assert human(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.7, "1:00"), (123, "2:03"), (3599.6, "1:00:00"), (90061, "25:01:01")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_console_line_of_several_validation_sets() -> None:
    several = row(7, val_loss=3.0)
    several.named = {"loss/web": 2.0, "val_loss/web": 3.0, "val_loss/code": 2.25}
    assert several.line() == row(7).line() + "  val web 3.0000 code 2.2500"
