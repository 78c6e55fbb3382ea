"""Results: what was measured and under which conditions, as JSON that is read back years later.

A folder of results holds one file a kind of record: ceilings.json, checks.json, kernels.json,
training.json, profile.json, tuning.json. A file is a list of records, one a line; a record is the
fields of its class below, `schema`, and the `conditions` it was measured under. Times are in
seconds, sizes in bytes, rates in units a second. A field may be added with a default, so that older
files can be read; `SCHEMA` grows with it, so that older code says why it cannot read newer ones.
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
    """What a number depends on besides the code."""

    date: str
    """UTC, ISO 8601."""
    commit: str
    """Of this repository, with `+changes` where the tree differed from it; empty if unknown."""
    device: str
    """As PyTorch names it, or the processor."""
    is_rehearsal: bool
    """Measured on a CPU, to show that the measuring works: nothing follows for a GPU."""
    n_multiprocessors: int
    """Streaming multiprocessors, or the threads PyTorch uses on a CPU."""
    memory_bytes: int
    """Of the device."""
    python: str
    torch: str
    triton: str
    cuda: str
    """Version PyTorch was built with; empty without."""
    cudnn: str
    driver: str
    """As nvidia-smi gives it; empty where there is none."""
    power_limit_watts: float | None = None
    max_sm_clock_mhz: float | None = None


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements: the median and the middle half."""

    median: float
    low: float
    """25th percentile."""
    high: float
    """75th percentile."""
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarise at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))

    def map(self, function: Callable[[float], float]) -> "Spread":
        """The spread of a monotonic function of the samples: a rate, of times."""
        low, high = sorted((function(self.low), function(self.high)))
        return Spread(function(self.median), low, high, self.n)

    @property
    def noise(self) -> float:
        """Width of the middle half over the median."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True)
class Ceiling:
    """The best rate seen of one resource: what floors are computed from."""

    name: str
    """copy, matmul, gemm, attention forward, attention backward."""
    provider: str
    """Who computed it: a library or an attention backend."""
    shape: dict[str, int]
    dtype: str
    rate: Spread
    """FLOP/s; for copy, bytes read and written a second."""


@dataclass(frozen=True)
class Check:
    """Something that holds or does not."""

    name: str
    passed: bool
    detail: str
    """The numbers behind it, or what went wrong."""


@dataclass(frozen=True)
class KernelTime:
    """One operator, in one shape and type, by one provider."""

    operator: str
    phase: str
    """forward, backward, both."""
    recipe: str
    shape: dict[str, int]
    dtype: str
    provider: str
    timer: str
    """graph: replays of a CUDA graph; events: CUDA events around calls; host: a CPU's clock."""
    device_s: Spread | None
    """Of the device, caches cold. None where `failure` says why."""
    host_s: Spread | None
    """Of a call that is waited for, launches included."""
    peak_bytes: int | None
    """Allocated at most during a call, beyond what was before; None on a CPU."""
    error: float | None
    """Largest error against float64 over the largest value, of the worst result."""
    bytes: float
    """Fewest that the operator has to move, by its docstring; those of products are left out."""
    flops: float
    """Of its matrix products."""
    floor_s: float
    """Bytes over the copy's rate plus FLOPs over the product's rate, of the same run."""
    failure: str = ""
    """What the provider raised."""

    @property
    def share_of_floor(self) -> float | None:
        """1 is as fast as the device can."""
        return None if self.device_s is None else self.floor_s / self.device_s.median


@dataclass(frozen=True)
class TrainingRun:
    """One way to train one recipe, in a process of its own."""

    contender: str
    """fastllama, a peer, or `fastllama without …` in an ablation."""
    recipe: str
    dtype: str
    seq_len: int
    batch_size: int
    """Sequences of a micro-batch, as the search found or as given."""
    tokens_per_update: int
    n_parameters: int
    seconds_per_update: Spread | None
    """In steady state. None where `failure` says why."""
    tok_per_s: float | None
    mfu_causal: float | None
    """Model FLOPs over the peak of the data sheet, attention below the diagonal; None without."""
    mfu_palm: float | None
    """The same with all of attention."""
    hfu: float | None
    """The same with the FLOPs executed: causal, and scores computed again in the backward."""
    bound_tok_per_s: float | None
    """The bound H of `fastllama.planning.flops`; None where the device's rates are not known."""
    bound_source: str
    """Where its rates are from."""
    peak_bytes: int | None
    seconds_to_first_update: float | None
    """From the start of the process: imports, compilation and all."""
    losses: list[float] = field(default_factory=list)
    """Of each update from the first: the same tokens and initial weights for all."""
    parity: str = ""
    """Empty where the losses are those of the plain model; else why the row is void."""
    sm_clock_mhz: float | None = None
    """Median while it ran."""
    power_watts: float | None = None
    """Median while it ran."""
    details: str = ""
    """What the contender says of itself: kernels, attention backend, versions."""
    failure: str = ""

    @property
    def share_of_bound(self) -> float | None:
        """1 is as fast as the bound allows."""
        if self.tok_per_s is None or self.bound_tok_per_s is None:
            return None
        return self.tok_per_s / self.bound_tok_per_s


@dataclass(frozen=True)
class ProfileShare:
    """Where the time of a training step goes: one class of operators."""

    recipe: str
    operator_class: str
    """matmul, attention, rms_norm, …; idle is when the device had nothing to do."""
    seconds: float
    """Of the device in one update."""
    share: float
    """Of the update's wall time."""
    calls: int
    """Kernels launched in one update."""
    bound_s: float | None
    """What the bound H allows this class; None where it has no part in it."""


@dataclass(frozen=True)
class Tuning:
    """One configuration of a kernel, as the search of benchmarks/tune.py tried it."""

    name: str
    """Of the configuration, in benchmarks/operators/pinned.py."""
    recipe: str
    n_tokens: int
    dtype: str
    config: dict[str, int]
    role: str
    """pinned: what the code has; tried: on the way; found: timed once more at the end."""
    device_s: Spread | None
    """Of the device, caches cold. None where `failure` says why."""
    floor_s: float
    """As of `KernelTime`."""
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
    """Add records to the files of `folder`; what is on disk is whole at every moment."""
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
    """The records of one kind in `folder`, in the order they were measured; none without a file.

    Raises:
        ValueError: a file is not one of results, or of a newer schema.
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
                raise ValueError(f"schema {schema} is newer than {SCHEMA}, which this code reads")
            yield Conditions(**entry.pop("conditions")), _record(kind, entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not a file of results ({error}); remove it, or read it with the code of "
            "the commit that wrote it."
        ) from None


def _record(kind: type[Kind], entry: dict[str, Any]) -> Kind:
    spreads = {
        name: Spread(**value)
        for name, value in entry.items()
        if isinstance(value, dict) and "median" in value
    }
    return kind(**entry | spreads)
