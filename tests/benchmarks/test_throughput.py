"""Training benchmarks: contenders, their workload, child processes, verdicts and ablations."""

import itertools
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import ablation, throughput
from benchmarks.results import Spread, TrainingRun
from benchmarks.training import child as child_process
from benchmarks.training.child import Child, best_batch_size, run_child, smaller
from benchmarks.training.contenders import CONTENDERS, run
from benchmarks.training.job import Budget, Job, Outcome, Spec
from benchmarks.training.peers import huggingface_model, torchtitan_model
from benchmarks.training.plain import adamw, loader_batches
from benchmarks.training.row import COMPARED_UPDATES, baseline, parity, training_run, verdict
from benchmarks.training.workload import (
    initial_model,
    read_batches,
    rehearsal,
    synthetic_tokens,
    with_synthetic_data,
    workload,
)
from fastllama.config import Config, load_recipe
from fastllama.optim.adamw import build_optimizer
from fastllama_kernels import TRITON

CPU = torch.device("cpu")
# Raised while other libraries are imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
FALLING = [3.0, 2.5, 2.0, 1.5]


def tiny() -> Config:
    """The smallest recipe. An update has four micro-batches."""
    config = rehearsal(load_recipe(throughput.REHEARSED_RECIPES[0]))
    model = replace(config.model, vocab_size=64, n_heads=4, n_kv_heads=2, max_seq_len=16)
    training = replace(config.training, tokens_per_update=256)
    return replace(config, model=model, training=training)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return with_synthetic_data(workload(tiny(), 256), tmp_path / "data")


def specification(contender: str, config: Config) -> Spec:
    return Spec(contender, config.to_dict(), 1, 5, 0.0)


def a_run(
    contender: str, losses: list[float], seconds: float = 1.0, noise: float = 0.01
) -> TrainingRun:
    """Row of a run with `seconds` per update."""
    outcome = Outcome(losses, [seconds * (1 + noise * k) for k in (-1, 0, 1)])
    return training_run(contender, "tiny", tiny(), outcome, rates=None)


@pytest.mark.parametrize(
    "contender",
    [
        "fastllama",
        pytest.param(
            "huggingface",
            marks=pytest.mark.skipif(
                throughput.unsupported_reason("huggingface") is not None, reason="no transformers"
            ),
        ),
        pytest.param(
            "torchtitan",
            marks=pytest.mark.skipif(
                throughput.unsupported_reason("torchtitan") is not None, reason="no torchtitan"
            ),
        ),
    ],
)
def test_contender_matches_plain_model(contender: str, config: Config) -> None:
    plain = run(specification("reference-eager", config))
    own = run(specification(contender, config))
    assert (plain.failure, own.failure) == ("", "")
    assert len(plain.losses) == 6
    assert plain.losses[0] == pytest.approx(math.log(64), abs=0.1)
    assert plain.losses[-1] < 0.97 * plain.losses[0]
    assert own.losses[:6] == pytest.approx(plain.losses, rel=1e-4)
    assert len(own.update_seconds) == len(own.losses) - 1
    assert own.seconds_to_first_update is not None
    assert own.seconds_to_first_update > 0


def test_plain_operators(config: Config) -> None:
    spec = replace(specification("fastllama", config), plain_operators=["rope", "swiglu"])
    assert run(spec).details.endswith("plain rope; plain swiglu")


@pytest.mark.parametrize("make", [huggingface_model, torchtitan_model])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_peers_compute_same_logits(make: Callable, tied: bool, scaling: float) -> None:
    pytest.importorskip({huggingface_model: "transformers"}.get(make, "torchtitan"))
    config = tiny()
    model = replace(
        config.model,
        tied_embeddings=tied,
        rope_scaling_factor=scaling,
        rope_original_max_seq_len=16,
        max_seq_len=64,
    )
    llama = initial_model(replace(config, model=model), CPU)
    with torch.no_grad():
        # Norm weights start as ones, which would hide swapped norms.
        for name, weight in llama.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
        tokens = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(0))
        logits = make(llama)(tokens)
        torch.testing.assert_close(getattr(logits, "logits", logits), llama(tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_plain_adamw_matches_fastllama_groups(tied: bool) -> None:
    config = tiny()
    config = replace(config, model=replace(config.model, tied_embeddings=tied))
    llama = initial_model(config, CPU)
    own = build_optimizer(llama, config.optimizer)
    plain = adamw(list(llama.parameters()), llama.embedding.weight, config)
    options = ("weight_decay", "lr", "betas", "eps", "fused")
    by_parameter = [
        {
            id(parameter): [group[option] for option in options]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for optimizer in (own, plain)
    ]
    assert by_parameter[0] == by_parameter[1]


def test_read_batches_matches_loader(config: Config) -> None:
    job = Job(config, CPU, Budget(specification("tutorial", config), ExitStack()), [])
    with loader_batches(job) as next_batch:
        for tokens, targets in itertools.islice(read_batches(config), 80):
            own_tokens, own_targets = next_batch()
            torch.testing.assert_close(own_tokens, tokens)
            torch.testing.assert_close(own_targets, targets)


def test_synthetic_tokens_follow_permutation() -> None:
    tokens = synthetic_tokens(100_000, 50, seed=1)
    assert tokens.shape == (100_000,)
    assert (tokens.min(), tokens.max()) == (0, 49)
    pairs = torch.zeros(50, 50)
    pairs.index_put_((torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])), torch.tensor(1.0), True)
    most, image = pairs.max(1)
    assert sorted(image.tolist()) == list(range(50))
    assert float(most.sum() / pairs.sum()) == pytest.approx(0.9 + 0.1 / 50, abs=0.01)


def test_child_returns_outcome(config: Config, tmp_path: Path) -> None:
    outcome = run_child(specification("reference-eager", config), tmp_path, timeout=60)
    assert outcome.failure == ""
    assert outcome.losses == run(specification("reference-eager", config)).losses
    assert outcome.peak_bytes is None


def in_a_shell(script: str, spec: Spec, written: Path) -> None:
    """Stands in for `write_outcome`."""
    os.execl("/bin/sh", "sh", "-c", script)


@pytest.mark.parametrize(
    ("script", "failure"),
    [
        ("echo Traceback >&2; echo 'MemoryError: full' >&2; exit 1", "MemoryError: full"),
        ("exit 3", "exit code 3"),
        ("kill -KILL $$", "killed by SIGKILL"),
    ],
)
def test_failed_child_gives_failed_row(
    script: str, failure: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "write_outcome", partial(in_a_shell, script))
    outcome = run_child(specification("fastllama", config), tmp_path, timeout=60)
    assert outcome == Outcome(failure=failure)
    row = training_run("fastllama", "tiny", config, outcome, rates=None)
    assert (row.tok_per_s, parity(row, None), verdict(row)) == (None, "", "failed")


def is_running(process: int) -> bool:
    try:
        return " Z " not in Path("/proc", str(process), "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_timeout_kills_child_and_descendants(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    script = f"sleep 600 & echo $! > {started}; wait"
    monkeypatch.setattr(child_process, "write_outcome", partial(in_a_shell, script))
    outcome = run_child(specification("fastllama", config), tmp_path, timeout=1.0)
    assert outcome.failure == "timed out after 1 s"
    process = int(started.read_text())
    # A killed process takes a moment to go, and may stay a zombie until its parent reaps it.
    end = time.time() + 10
    while is_running(process) and time.time() < end:
        time.sleep(0.05)
    assert not is_running(process)


def test_contender_exception_becomes_failure(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_out_of_memory(job: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore of it")

    contender = replace(CONTENDERS["tutorial"], train=raise_out_of_memory)
    monkeypatch.setitem(CONTENDERS, "tutorial", contender)
    outcome = run(specification("tutorial", config))
    assert outcome.failure == "RuntimeError: CUDA error: out of memory"
    assert outcome.is_out_of_memory


@pytest.mark.parametrize(
    ("rates", "found", "tried"),
    [
        # Two gains above 1 %, then one below.
        ({4: 100, 8: 120, 16: 130, 32: 131}, 16, [4, 8, 16, 32]),
        # Out of memory ends the search in both directions.
        ({4: 100, 8: 120, 16: None}, 8, [4, 8, 16]),
        ({4: None, 2: None, 1: 10}, 1, [4, 2, 1]),
        ({4: None, 2: 10}, 2, [4, 2]),
        ({4: None, 2: None, 1: None}, 1, [4, 2, 1]),
        # An update has 32 sequences.
        ({4: 1, 8: 2, 16: 3, 32: 4}, 32, [4, 8, 16, 32]),
        # A failed trial ends the search; the run reports the failure.
        ({4: 0.0}, 4, [4]),
        ({4: 100, 8: 0.0}, 4, [4, 8]),
    ],
)
def test_best_batch_size(rates: dict[int, float | None], found: int, tried: list[int]) -> None:
    asked: list[int] = []

    def rate(size: int) -> float | None:
        asked.append(size)
        return rates[size]

    assert (best_batch_size(4, 32, rate), asked) == (found, tried)


def test_smaller_batch_divides_update() -> None:
    assert smaller(12, 36) == 6
    assert smaller(9, 36) == 4
    assert smaller(3, 36) == 1


def test_out_of_memory_halves_batch(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def fake(spec: Spec, folder: Path, timeout: float) -> Outcome:
        sizes.append(spec.config["training"]["batch_size"])
        full = sizes[-1] > 1
        return Outcome(FALLING, [1.0], failure="full" if full else "", is_out_of_memory=full)

    monkeypatch.setattr(child_process, "run_child", fake)
    size, outcome = Child("tutorial", tmp_path, 0.0, None).train(config, search=False)
    assert (size, sizes, outcome.failure) == (1, [4, 2, 1], "")


def test_parity() -> None:
    plain = a_run("reference-eager", FALLING)
    assert parity(plain, None) == ""
    assert parity(a_run("peer", [loss * 1.00009 for loss in FALLING]), plain) == ""
    assert parity(a_run("peer", FALLING[:2]), plain) == ""
    assert parity(a_run("peer", [3.0, 2.5, 2.001, 1.5]), plain) == (
        "The loss of update 3 is 2.0010, but 2.0000 for reference-eager; the relative tolerance is "
        "0.0001."
    )
    stuck = "The loss did not fall: first 3.0000, last 3.0000."
    assert parity(a_run("peer", [3.0, 2.5, 3.0]), None) == stuck
    assert parity(a_run("peer", [3.0, math.nan]), plain) != ""
    assert parity(a_run("peer", [3.0, math.nan, 2.0, 1.5]), plain) != ""
    in_bfloat16 = replace(a_run("peer", [loss * 1.009 for loss in FALLING]), dtype="bfloat16")
    assert parity(in_bfloat16, plain) == ""
    assert parity(replace(in_bfloat16, losses=[3.0, 2.5, 2.03, 1.5]), plain) != ""


def test_parity_ignores_late_updates() -> None:
    losses = [3 - step / 100 for step in range(COMPARED_UPDATES + 1)]
    plain = a_run("reference-eager", losses)
    assert parity(a_run("peer", [*losses[:-1], 1.0]), plain) == ""
    assert parity(a_run("peer", [*losses[:-2], 1.0, 1.0]), plain) != ""


def test_baseline_is_first_valid_run() -> None:
    failed = replace(a_run("reference-eager", []), failure="full")
    void = replace(a_run("reference-compiled", FALLING), parity="no")
    good = a_run("huggingface", FALLING)
    assert baseline([failed, void]) is None
    assert baseline([failed, void, good, a_run("fastllama", FALLING)]) is good


def test_ratios_skip_void_and_failed_runs() -> None:
    runs = [
        a_run("fastllama", FALLING, seconds=0.5),
        a_run("reference-eager", FALLING, seconds=1.0),
        replace(a_run("tutorial", FALLING), parity="no"),
        replace(a_run("huggingface", []), failure="full", tok_per_s=None),
    ]
    assert throughput.ratios(runs) == ["fastllama / reference-eager: 2.00"]
    assert throughput.ratios([replace(runs[0], parity="no"), *runs[1:]]) == []


def test_budget_stops_before_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    asked = replace(specification("fastllama", tiny()), warm_ups=2, min_updates=50)
    early, late = (
        Budget(replace(asked, deadline=deadline), ExitStack()) for deadline in (None, 117.0)
    )
    answers = []
    for _ in range(4):
        now += 5.0
        answers.append((early.is_spent(), late.is_spent()))
    # The third update is the first timed one. Two more of 5 s would end at 125 s.
    assert answers == [(False, False), (False, False), (False, True), (False, True)]


def test_no_contender_starts_after_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, finished, timeouts = [], [], []

    def fake(spec: Spec, folder: Path, timeout: float) -> Outcome:
        started.append(spec.contender)
        timeouts.append(timeout)
        if len(started) == 2:
            monkeypatch.setattr(time, "time", lambda: math.inf)
        return Outcome(FALLING if len(started) == 1 else FALLING[::-1], [1.0])

    monkeypatch.setattr(child_process, "run_child", fake)
    runs = throughput.measure(
        tiny(),
        "tiny",
        ["fastllama", "reference-eager", "tutorial"],
        seconds=0.0,
        batch_size=4,
        tokens_per_update=256,
        deadline=time.time() + 1000,
        rates=None,
        folder=tmp_path,
        finished=finished.append,
    )
    assert started == ["reference-eager", "fastllama"]
    # Each gets its share of the remaining time; the tutorial compiles and has weight 1.5.
    assert timeouts == pytest.approx([1000 / 3.5, 1000 / 2.5], rel=0.01)
    assert [verdict(run) for run in runs] == ["valid", "void"]
    assert finished == runs


@pytest.mark.parametrize("option", ["--contenders nemo", "--batch-size 0", "no-such.toml"])
def test_wrong_arguments(option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "results"
    with pytest.raises(SystemExit) as exit_:
        throughput.main([*option.split(), "--out", str(out)])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert option.split()[-1] in message
    if "nemo" in option:
        assert all(name in message for name in CONTENDERS)
    assert not out.exists()


def test_variants_change_only_their_options() -> None:
    config = tiny()
    config = replace(config, training=replace(config.training, compile=True, attention="cudnn"))
    changed = {}
    for name, variant in ablation.VARIANTS.items():
        after = variant.change(config).to_dict()
        changed[name] = {
            f"{group}.{option}"
            for group, options in config.to_dict().items()
            for option, value in options.items()
            if after[group][option] != value
        } | set(variant.plain_operators)
    assert changed == {
        "rms_norm": {"rms_norm", "add_rms_norm", "add_rms_norm_linear"},
        "rope": {"rope"},
        "swiglu": {"swiglu", "swiglu_linear"},
        "fused-loss": {"linear_cross_entropy"},
        "kernels": {"training.kernels"},
        "attention": {"training.attention"},
        "recomputing": {"training.save_projection_inputs"},
        "compile": {"training.compile"},
        "prefetch": {"data.prefetch"},
        "kept-parameters": {"parallel.reshard_after_forward"},
    }
    operators = {field.name for field in fields(TRITON)}
    assert all(operators >= set(v.plain_operators) for v in ablation.VARIANTS.values())


def test_order_of_full_runs() -> None:
    assert ablation.order(["a", "b", "c"], 1) == [None, "a", "b", None, "c", None]
    assert ablation.order(["a"], 2) == [None, "a", None, "a", None]


def test_effect_verdict() -> None:
    def found(without: float, noise: float) -> ablation.Effect:
        runs = [
            a_run("fastllama", FALLING, 1.0, noise),
            a_run("fastllama without rope", FALLING, without, noise),
            a_run("fastllama", FALLING, 1.2, noise),
            a_run("fastllama without compile", FALLING, 9.0, noise),
            a_run("fastllama", FALLING, 9.0, noise),
        ]
        effect = ablation.effect(runs, "fastllama without rope")
        assert effect is not None
        assert effect.ratio == pytest.approx(1.1 / without)
        return effect

    assert found(1.5, 0.01).verdict == "helps"
    assert found(0.8, 0.01).verdict == "hurts"
    # Between the two full runs, and within the spread of their updates.
    assert found(1.1, 0.01).verdict == "within noise"
    assert found(1.3, 0.20).verdict == "within noise"
    assert ablation.effect([], "fastllama without rope") is None


def test_training_run_rates() -> None:
    row = a_run("fastllama", FALLING, seconds=2.0, noise=0.5)
    assert row.seconds_per_update == Spread(2.0, 1.5, 2.5, 3)
    assert row.tok_per_s == 256 * 8 / 16
    assert (row.mfu_causal, row.bound_tok_per_s, row.share_of_bound) == (None, None, None)
