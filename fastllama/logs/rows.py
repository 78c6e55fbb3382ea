"""The row of an update: the columns of metrics.csv and the line on the console."""

import csv
import io
import itertools
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastllama.config import DataConfig

VALIDATION = "val_loss/"
"""Prefix of the columns that hold the losses of several validation sets."""

SLOW = 0.05
"""Share of an update's time from which the console names a slow rank."""


@dataclass
class Row:
    """One logged update. The fields are the columns of metrics.csv, in this order."""

    step: int
    """Optimizer updates since the run began, from 1."""
    tokens: int
    """Tokens trained on since this session started; a rewind counts its tokens again."""
    tokens_total: int
    """Tokens trained on since the run began."""
    loss: float
    """Training loss of this update's tokens, in nats: the mean negative log-likelihood, with
    `training.z_loss` and `training.label_smoothing` where they are set."""
    perplexity: float
    """exp(loss)."""
    lr: float
    """Learning rate of this update."""
    grad_norm: float
    """Global gradient norm before clipping."""
    tok_per_s: float
    """Tokens a second over all devices since the last row; side jobs are excluded."""
    time_s: float
    """Wall seconds since this session started training."""
    data_wait_s: float
    """Seconds since the last row that training waited for data."""
    skipped_steps: int
    """Updates skipped since the run began, because loss or gradient norm was bad."""
    progress: float
    """Fraction of the run's updates done."""
    eta_s: float
    """Wall seconds left, at the average pace of this session."""
    mfu_causal: float | None = None
    """Model FLOPs over the devices' peak; attention is counted below the diagonal only."""
    mfu_palm: float | None = None
    """Model FLOPs over the devices' peak; attention is counted in full, as in the PaLM paper."""
    val_loss: float | None = None
    """Mean negative log-likelihood after this update on the held-out split, or the first validation
    set, in nats."""
    val_bits_per_byte: float | None = None
    """val_loss in bits a byte of text; comparable between tokenizers."""
    peak_gib: float | None = None
    """Peak memory that PyTorch has allocated on the main process's GPU, in GiB."""
    slow_rank: int | None = None
    """The rank that the others waited for most in recent updates."""
    slow_rank_share: float | None = None
    """Fraction of an update's time that they waited for it in collectives."""
    named: dict[str, float] = field(default_factory=dict)
    """Columns of several sources or validation sets, by names such as "loss/web"; they come last.

    "loss/NAME" is the mean loss of the source since the last row, "tokens/NAME" its tokens that the
    run has passed, skipped data included.
    """

    def cells(self) -> dict[str, Any]:
        """The values by column."""
        fixed = asdict(self)
        return fixed | fixed.pop("named")

    def line(self) -> str:
        """The row for the console."""
        parts = [
            f"step {self.step}",
            f"{self.progress:6.1%}",
            f"loss {self.loss:.4f}",
            f"ppl {self.perplexity:.1f}",
            f"lr {self.lr:.2e}",
            f"gnorm {self.grad_norm:.2f}",
            f"tok {human(self.tokens_total)}",
            f"{self.tok_per_s:,.0f} tok/s",
            f"{duration(self.time_s)}",
            f"eta {duration(self.eta_s)}",
            f"wait {self.data_wait_s:.2f}s",
        ]
        if self.mfu_causal is not None and self.mfu_palm is not None:
            parts.append(f"mfu {self.mfu_causal:.1%} causal {self.mfu_palm:.1%} palm")
        if self.peak_gib is not None:
            parts.append(f"peak {self.peak_gib:.1f} GiB")
        if self.skipped_steps:
            parts.append(f"skipped {self.skipped_steps}")
        if self.slow_rank_share is not None and self.slow_rank_share > SLOW:
            parts.append(f"waits for rank {self.slow_rank} {self.slow_rank_share:.0%}")
        sets = [name for name in self.named if name.startswith(VALIDATION)]
        if sets:
            parts.append(
                "val "
                + " ".join(
                    f"{name.removeprefix(VALIDATION)} {self.named[name]:.4f}" for name in sets
                )
            )
        elif self.val_loss is not None and self.val_bits_per_byte is not None:
            parts.append(f"val {self.val_loss:.4f} ({self.val_bits_per_byte:.3f} bits/byte)")
        return "  ".join(parts)


COLUMNS = [column.name for column in fields(Row) if column.name != "named"]


def named_columns(data: DataConfig) -> list[str]:
    """The columns of several sources and validation sets; none where there is only one."""
    of_sources = [f"{kind}/{name}" for name in data.source_names for kind in ("loss", "tokens")]
    of_sets = [
        f"{kind}/{name}"
        for name in data.validation_names
        for kind in ("val_loss", "val_bits_per_byte")
    ]
    return (of_sources if len(data.source_names) > 1 else []) + (
        of_sets if len(data.validation_names) > 1 else []
    )


def csv_line(row: Row, columns: Sequence[str] = COLUMNS) -> bytes:
    """The row as a line of a metrics.csv with these `columns`."""
    text = io.StringIO()
    cells = row.cells()
    csv.writer(text, lineterminator="\n").writerow(
        ["" if (value := cells.get(column)) is None else value for column in columns]
    )
    return text.getvalue().encode()


def json_line(row: Row) -> bytes:
    """The row as a line of metrics.jsonl."""
    values = {name: finite(value) for name, value in row.cells().items()}
    return (json.dumps(values) + "\n").encode()


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def columns_of(header: bytes) -> list[str]:
    """The columns that the first line of a metrics.csv names; none if it is not our header.

    An older version had fewer columns. Columns of sources and validation sets have a slash.
    """
    names = header.decode("utf-8-sig", "replace").split(",")
    names[-1] = names[-1].rstrip("\r\n")
    fixed = list(itertools.takewhile(lambda name: "/" not in name, names))
    named = names[len(fixed) :]
    is_ours = header.endswith(b"\n") and fixed and fixed == COLUMNS[: len(fixed)]
    is_ours = is_ours and all("/" in name for name in named) and len(set(named)) == len(named)
    return names if is_ours else []


def parse_row(line: bytes, columns: list[str]) -> dict[str, float]:
    """The cells of a line of metrics.csv as numbers, without empty cells.

    Raises:
        ValueError: the line is damaged.
    """
    cells = line.strip(b"\r\n").split(b",")
    int(cells[0])  # a step is a whole number
    return {name: float(cell) for name, cell in zip(columns, cells, strict=True) if cell}


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv as numbers, without empty cells and damaged lines."""
    header, *lines = path.read_bytes().split(b"\n")
    columns = columns_of(header + b"\n")
    rows = []
    for line in lines:
        with suppress(ValueError):
            rows.append(parse_row(line, columns))
    return rows


def human(count: int) -> str:
    """A count of tokens in a few characters: 9,216 or 102.4k or 1.3B."""
    if count < 10_000:
        return f"{count:,}"
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if round(count / size, 1) >= 1:
            return f"{count / size:.1f}{letter}"
    return f"{count / 1000:.1f}k"


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
