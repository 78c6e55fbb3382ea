"""Results on disk: measurements and their conditions, as JSON.

A results folder holds one file per kind of record: ceilings.json, checks.json, kernels.json,
training.json, profile.json, tuning.json. Each file is a list with one record per line. A record
holds the fields of its class below, `schema`, and the `conditions` of the measurement. Times are in
seconds, sizes in bytes, rates in units per second. A new field needs a default, so that older files
stay readable, and a higher `SCHEMA`, so that older code can report why it cannot read newer files.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastllama.atomic import write_atomic

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Conditions:
    """Everything a number depends on besides the code."""

    date: str
    """UTC, ISO 8601."""
    commit: str
    """Commit of this repository, plus `-dirty` if the tree differed from it; empty if unknown."""
    device: str
    """PyTorch's name of the GPU, or the name of the CPU."""
    is_rehearsal: bool
    """True for a run on a CPU, which tests the benchmark code and says nothing about a GPU."""
    n_multiprocessors: int
    """Streaming multiprocessors of the GPU, or PyTorch's threads on a CPU."""
    memory_bytes: int
    """Total memory of the device."""
    python: str
    torch: str
    triton: str
    cuda: str
    """CUDA version PyTorch was built with; empty for a CPU build."""
    cudnn: str
    driver: str
    """Driver version from nvidia-smi; empty without nvidia-smi."""
    power_limit_watts: float | None = None
    max_sm_clock_mhz: float | None = None


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range of repeated measurements."""

    median: float
    low: float
    """25th percentile."""
    high: float
    """75th percentile."""
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Spread of one or more samples."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))

    def map(self, function: Callable[[float], float]) -> "Spread":
        """Spread of a monotonic function of the samples, such as a rate computed from times."""
        low, high = sorted((function(self.low), function(self.high)))
        return Spread(function(self.median), low, high, self.n)

    @property
    def noise(self) -> float:
        """Interquartile range over the median."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True)
class Ceiling:
    """Measured peak rate of one resource. Floors are computed from ceilings."""

    name: str
    """copy, matmul, gemm …, attention forward or attention backward."""
    provider: str
    """Library or attention backend."""
    shape: dict[str, int]
    dtype: str
    rate: Spread
    """FLOP/s; for copy, bytes read plus bytes written per second."""


@dataclass(frozen=True)
class Check:
    """A condition that holds or does not."""

    name: str
    passed: bool
    detail: str
    """The numbers behind the result, or the error."""


@dataclass(frozen=True)
class KernelTime:
    """One phase of one operator, in one shape and dtype, by one provider."""

    operator: str
    phase: str
    """forward, backward or both."""
    recipe: str
    shape: dict[str, int]
    dtype: str
    provider: str
    timer: str
    """graph: replay of a CUDA graph; events: CUDA events around each call; host: CPU clock."""
    device_s: Spread | None
    """Device time with a cold cache. None after a `failure`."""
    host_s: Spread | None
    """Wall time from the launch of a call until it has finished."""
    peak_bytes: int | None
    """Peak allocation of a call on top of the memory already in use; None on a CPU."""
    error: float | None
    """Largest absolute error against float64 over the largest value, of the worst result."""
    bytes: float
    """Least bytes the operator must move, from its docstring, without the matmuls' operands."""
    flops: float
    """FLOPs of its matmuls."""
    floor_s: float
    """bytes over the copy rate, plus flops over the matmul rate; both rates from the same run."""
    failure: str = ""
    """The exception the provider raised."""

    @property
    def share_of_floor(self) -> float | None:
        """Floor over device time; 1 is the fastest the device allows."""
        return None if self.device_s is None else self.floor_s / self.device_s.median


@dataclass(frozen=True)
class TrainingRun:
    """One contender that trained one recipe in its own process."""

    contender: str
    """fastllama, the name of a peer, or `fastllama without …` in an ablation."""
    recipe: str
    dtype: str
    seq_len: int
    batch_size: int
    """Sequences per micro-batch, as found by the search or as given."""
    tokens_per_update: int
    n_parameters: int
    seconds_per_update: Spread | None
    """Time of a steady-state update. None after a `failure`."""
    tok_per_s: float | None
    mfu_causal: float | None
    """Model FLOP/s over the data-sheet peak, causal attention; None if the peak is unknown."""
    mfu_palm: float | None
    """The same, with attention counted unmasked (PaLM)."""
    hfu: float | None
    """The same, with the executed FLOPs: causal, plus the recomputed scores of the backward."""
    bound_tok_per_s: float | None
    """The bound H of `fastllama.planning.bound`; None if the rates of the device are unknown."""
    bound_source: str
    """Source of the rates behind the bound."""
    peak_bytes: int | None
    seconds_to_first_update: float | None
    """Initialisation and compilation; without imports since the second run on an H100."""
    losses: list[float] = field(default_factory=list)
    """Loss of each update. All contenders share tokens and initial weights."""
    parity: str = ""
    """Empty if the losses match the plain model; otherwise the reason the row is void."""
    sm_clock_mhz: float | None = None
    """Median over the timed updates."""
    power_watts: float | None = None
    """Median over the timed updates."""
    details: str = ""
    """The contender's description of itself: kernels, attention backend, versions."""
    failure: str = ""

    @property
    def share_of_bound(self) -> float | None:
        """Tokens/s over the bound; 1 is the fastest the bound allows."""
        if self.tok_per_s is None or self.bound_tok_per_s is None:
            return None
        return self.tok_per_s / self.bound_tok_per_s


@dataclass(frozen=True)
class ProfileShare:
    """Share of one class of kernels in the time of an update."""

    recipe: str
    operator_class: str
    """matmul, attention, rms_norm, …; idle is the time without any kernel running."""
    seconds: float
    """Device time in one update."""
    share: float
    """Fraction of the update's wall time."""
    calls: int
    """Kernel launches in one update."""
    bound_s: float | None
    """Seconds of this class in the bound H; None if the bound does not contain it."""


@dataclass(frozen=True)
class Tuning:
    """One configuration of a kernel that benchmarks/tune.py tried."""

    name: str
    """Name of the kernel in benchmarks/operators/pinned.py."""
    recipe: str
    n_tokens: int
    dtype: str
    config: dict[str, int]
    role: str
    """pinned: used by the code; tried: a step of the search; found: its result, timed again."""
    device_s: Spread | None
    """Device time with a cold cache. None after a `failure`."""
    floor_s: float
    """As in `KernelTime`."""
    failure: str = ""


Record = Ceiling | Check | KernelTime | TrainingRun | ProfileShare | Tuning
FILES: dict[type, str] = {
    Ceiling: "ceilings.json",
    Check: "checks.json",
    KernelTime: "kernels.json",
    TrainingRun: "training.json",
    ProfileShare: "profile.json",
    Tuning: "tuning.json",
}
Kind = TypeVar("Kind", Ceiling, Check, KernelTime, TrainingRun, ProfileShare, Tuning)


def append(folder: Path, conditions: Conditions, records: Sequence[Record]) -> None:
    """Append records to the files of `folder`. Each file is replaced atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, name in FILES.items():
        lines = [
            json.dumps(
                {
                    "schema": SCHEMA,
                    **dataclasses.asdict(record),
                    "conditions": dataclasses.asdict(conditions),
                }
            )
            for record in records
            if isinstance(record, kind)
        ]
        if lines:
            file = folder / name
            before = _lines(file) if file.exists() else []
            write_atomic(file, "[\n" + ",\n".join([*before, *lines]) + "\n]\n")


def _lines(file: Path) -> list[str]:
    return [line.rstrip(",") for line in file.read_text().splitlines()[1:-1]]


def read(folder: Path, kind: type[Kind]) -> Iterator[tuple[Conditions, Kind]]:
    """Records of one kind in `folder`, in the order of measurement; none without a file.

    Raises:
        ValueError: the file is not a results file, or has a newer schema.
    """
    file = folder / FILES[kind]
    if not file.exists():
        return
    try:
        entries: list[dict[str, Any]] = json.loads(file.read_text())
        if not isinstance(entries, list):
            raise TypeError("it is not a list")
        for entry in entries:
            schema = entry.pop("schema")
            if schema > SCHEMA:
                raise ValueError(
                    f"schema {schema} is newer than {SCHEMA}, the newest this code reads"
                )
            yield Conditions(**entry.pop("conditions")), _record(kind, entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not a results file ({error}); remove it, or read it with the commit that "
            "wrote it."
        ) from None


def _record(kind: type[Kind], entry: dict[str, Any]) -> Kind:
    spreads = {
        name: Spread(**value)
        for name, value in entry.items()
        if isinstance(value, dict) and "median" in value
    }
    return kind(**entry | spreads)
