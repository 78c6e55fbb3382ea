"""The tuning search finds faster correct configurations, and launches use what it tries."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks import tune
from benchmarks.conditions import current_conditions
from benchmarks.operators.case import Work
from benchmarks.operators.measure import REHEARSED_TOKENS
from benchmarks.operators.pinned import PINNED, LaunchConfig, Pinned
from benchmarks.reporting.result_set import ResultSet
from benchmarks.reporting.tuning import is_faster, tuning_section, verdict
from benchmarks.results import Spread, Tuning, append, read
from benchmarks.timing import make_timer
from benchmarks.tune import LIMITS, Search, hill_climb, neighbours, search_all
from fastllama.config import ModelConfig
from tests.compare import DEVICE

MODEL = ModelConfig(
    vocab_size=256, n_embd=64, n_layers=1, n_heads=4, n_kv_heads=2, multiple_of=32, max_seq_len=8
)
START = {"BLOCK": 1024, "num_warps": 4, "NUM_STAGES": 3, "BLOCK_R": 32}
BEST = {"BLOCK": 4096, "num_warps": 16, "NUM_STAGES": 5, "BLOCK_R": 32}


def steady(seconds: float) -> Spread:
    return Spread(seconds, 0.999 * seconds, 1.001 * seconds, 5)


def distance_to_best(config: LaunchConfig) -> float:
    return 1.0 + sum(abs(value - config[name]) / value for name, value in BEST.items())


def test_hill_climb_finds_fastest_without_repeats() -> None:
    tried: list[LaunchConfig] = []

    def measure(configs: Sequence[LaunchConfig]) -> list[Spread | None]:
        best, *new = configs
        assert all(distance_to_best(best) <= distance_to_best(other) for other in tried)
        assert not any(config in tried for config in new)
        tried.extend(new)
        return [steady(distance_to_best(config)) for config in configs]

    assert hill_climb(START, measure) == BEST
    # BLOCK_R follows from the shape and must not change.
    assert {config["BLOCK_R"] for config in tried} == {32}


def test_hill_climb_ignores_gains_within_noise() -> None:
    def measure(configs: Sequence[LaunchConfig]) -> list[Spread | None]:
        return [Spread(1.0, 0.9, 1.1, 5), *(Spread(0.95, 0.85, 1.05, 5) for _ in configs[1:])]

    assert hill_climb(START, measure) == START


def test_hill_climb_skips_failures_and_ends_on_timeout() -> None:
    def half_fail(configs: Sequence[LaunchConfig]) -> list[Spread | None]:
        return [
            None if config["num_warps"] > 4 else steady(distance_to_best(config))
            for config in configs
        ]

    assert hill_climb(START, half_fail)["num_warps"] == 4
    assert hill_climb(START, lambda _: []) == START


def test_neighbours_respect_limits() -> None:
    found = list(neighbours({"BLOCK": LIMITS["BLOCK"][1], "num_warps": 8, "NUM_STAGES": 1}))
    blocks = {config["BLOCK"] for config in found}
    assert blocks == {2**15, 2**14}
    assert {"BLOCK": 2**14, "num_warps": 4, "NUM_STAGES": 1} in found
    assert {config["NUM_STAGES"] for config in found} == {1, 2}
    for config in found:
        assert all(
            least <= config[name] <= most
            for name, (least, most) in LIMITS.items()
            if name in config
        )


def test_is_faster() -> None:
    old = steady(1.0)
    assert is_faster(steady(0.98), old)
    assert not is_faster(steady(0.995), old)
    assert not is_faster(Spread(0.9, 0.8, 1.01, 5), old)


@pytest.mark.parametrize("pinned", PINNED, ids=lambda pinned: pinned.name)
def test_launches_use_replaced_configuration(pinned: Pinned) -> None:
    inputs = pinned.inputs(MODEL, 8, torch.Generator(DEVICE).manual_seed(0))
    config = pinned.config(MODEL, 8)
    # A kernel cannot launch without its options.
    with pinned.replaced_by({}), pytest.raises((KeyError, TypeError, RuntimeError)):
        pinned.launch(*inputs)
    assert pinned.config(MODEL, 8) == config
    for other in neighbours(config):
        with pinned.replaced_by(other):
            assert pinned.config(MODEL, 8) == other


@pytest.mark.parametrize("pinned", PINNED, ids=lambda pinned: pinned.name)
def test_neighbours_compute_same_result(pinned: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    # The toy shapes need blocks below the usual limits.
    for name, (_, most) in LIMITS.items():
        monkeypatch.setitem(LIMITS, name, (1, most))
    timer = make_timer(torch.device(DEVICE))
    search = Search(
        pinned, "tiny", MODEL, REHEARSED_TOKENS, timer, lambda work: work.bytes, lambda row: None
    )
    # Half and twice the block size: rows that exceed a block, and rows that do not fill one.
    half, twice, *_ = neighbours(pinned.config(MODEL, REHEARSED_TOKENS))
    assert [search._failure(config) for config in (half, twice)] == ["", ""]


def fake_pinned(launch: dict[int, float]) -> Pinned:
    """Fake kernel: `launch` maps num_warps to its result; other values fail."""
    module = ModuleType("fake")
    module.config = lambda _: {"num_warps": 4}  # type: ignore[attr-defined]

    def run() -> list[Tensor]:
        return [torch.tensor([launch[module.config(0)["num_warps"]]])]

    return Pinned(
        name="fake",
        module=module,
        functions=("config",),
        sizes=lambda *_: (0,),
        inputs=lambda *_: (),
        launch=run,
        work=lambda *_: Work(4.0),
    )


def test_failing_configurations_are_reported() -> None:
    rows: list[Tuning] = []
    timer = make_timer(torch.device("cpu"))
    # 2 warps differ by rounding, 8 give NaN, 16 cannot launch.
    pinned = fake_pinned({4: 1.0, 2: 1.001, 8: float("nan")})
    search = Search(
        pinned, "tiny", MODEL, REHEARSED_TOKENS, timer, lambda work: work.bytes, rows.append
    )
    search._measure([{"num_warps": n} for n in (4, 2, 8, 16)], "tried")
    assert [row.role for row in rows] == ["pinned", "tried", "tried", "tried"]
    assert [row.failure for row in rows] == [
        "",
        "",
        "differs from the pinned result by nan of the largest value",
        "KeyError: 16",
    ]
    assert [row.device_s is None for row in rows] == [False, False, True, True]


def row(seconds: float | None, **config: int) -> Tuning:
    spread = None if seconds is None else steady(seconds)
    return Tuning("swiglu", "tiny", 8, "bfloat16", config, "pinned", spread, 1.0, "broken")


@pytest.mark.parametrize(
    ("was", "found", "words"),
    [
        (row(1.0, BLOCK=1), row(1.0, BLOCK=1), "keep"),
        (row(1.0, BLOCK=1), row(0.9, BLOCK=2), "pin"),
        (row(1.0, BLOCK=1), row(1.0, BLOCK=2), "keep: no gain when measured again"),
        (row(None, BLOCK=1), row(None, BLOCK=1), "the pinned configuration fails: broken"),
    ],
)
def test_verdict(was: Tuning, found: Tuning, words: str) -> None:
    assert verdict(was, found) == words


def test_report_shows_latest_search(tmp_path: Path) -> None:
    before, after = steady(20e-6), steady(10e-6)
    pinned = replace(row(1.0, BLOCK=1024, num_warps=4), device_s=before, floor_s=9e-6)
    tried = replace(row(1.0, BLOCK=512, num_warps=4), role="tried")
    found = replace(row(1.0, BLOCK=2048, num_warps=4), role="found", device_s=after)
    kept = replace(pinned, name="rope", config={"num_warps": 8})
    again = replace(pinned, recipe="small", floor_s=20e-6)
    append(tmp_path, current_conditions(), [pinned, tried, pinned, found, kept, again])
    *_, first, second, third = tuning_section(ResultSet.load(tmp_path)).splitlines()
    options = "BLOCK 1,024, num_warps 4"
    assert first == (
        f"| swiglu | tiny | {options} | BLOCK 2,048 | pin | 20.0 | 45% | 10.0 | +100.0% |"
    )
    assert second == "| rope | tiny | num_warps 8 |  | keep | 20.0 | 45% | 20.0 | +0.0% |"
    assert third == f"| swiglu | small | {options} |  | keep | 20.0 | 100% | 20.0 | +0.0% |"


def test_timeout_still_measures_pinned_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (swiglu,) = (pinned for pinned in PINNED if pinned.name == "swiglu")
    search_all([swiglu], ["quickstart"], tmp_path, end=time.time())
    ((conditions, only),) = read(tmp_path, Tuning)
    assert (only.name, only.role, only.failure) == ("swiglu", "pinned", "")
    assert only.device_s is not None
    assert "swiglu, quickstart: keep" in capsys.readouterr().out
    assert conditions.is_rehearsal == (DEVICE == "cpu")


def test_unknown_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tune.py", "softmax"])
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    assert stopped.value.code == 2
    assert "unknown kernel 'softmax'; choose from 'rms_norm forward'" in capsys.readouterr().err
