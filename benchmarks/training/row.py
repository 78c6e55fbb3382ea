"""The row of a contender, and whether it counts."""

import math
from collections.abc import Sequence

import torch

from benchmarks.conditions import has_gpu
from benchmarks.results import Spread, TrainingRun
from benchmarks.training.job import Outcome
from fastllama.config import Config
from fastllama.planning.bound import ASSUMED_RATES, Rates, bound
from fastllama.planning.flops import (
    flops_per_token,
    hardware_flops_per_token,
    n_parameters,
    peak_flops,
)

PARITY_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Relative, between losses of two contenders.

A value in bfloat16 is off by up to 2^-9, but a loss is the mean over all tokens of an update, where
such errors mostly cancel: four contenders of the rehearsal's shape, in bfloat16 on a CPU, stay
within 1.3e-4 for 13 updates. Room is left for larger models, and float32 is where a test is sharp.
"""
COMPARED_UPDATES = 20
"""Beyond these, rounding alone can take two runs apart."""


def training_run(
    contender: str, recipe: str, config: Config, outcome: Outcome, rates: Rates | None
) -> TrainingRun:
    """The row of an outcome; parity is left to be judged."""
    model, training = config.model, config.training
    spread = None if outcome.failure else Spread.of(outcome.update_seconds)
    tok_per_s = None if spread is None else training.tokens_per_update / spread.median
    peak = peak_flops(torch.cuda.get_device_name()) if has_gpu() else None

    def utilisation(flops: float) -> float | None:
        return None if peak is None or tok_per_s is None else flops * tok_per_s / peak

    # The rates are those of bfloat16.
    bounded = rates if training.dtype == "bfloat16" else None
    return TrainingRun(
        contender=contender,
        recipe=recipe,
        dtype=training.dtype,
        seq_len=model.max_seq_len,
        batch_size=training.batch_size,
        tokens_per_update=training.tokens_per_update,
        n_parameters=n_parameters(model),
        seconds_per_update=spread,
        tok_per_s=tok_per_s,
        mfu_causal=utilisation(flops_per_token(model, causal=True)),
        mfu_palm=utilisation(flops_per_token(model, causal=False)),
        hfu=utilisation(hardware_flops_per_token(model)),
        bound_tok_per_s=bound(model, training.tokens_per_update, bounded).tokens_per_second
        if bounded
        else None,
        bound_source=bounded.source if bounded else "",
        peak_bytes=outcome.peak_bytes,
        seconds_to_first_update=outcome.seconds_to_first_update,
        losses=outcome.losses,
        sm_clock_mhz=outcome.sm_clock_mhz,
        power_watts=outcome.power_watts,
        details=outcome.details,
        failure=outcome.failure,
    )


def baseline(runs: Sequence[TrainingRun]) -> TrainingRun | None:
    """The run whose losses the others are held to: the first that trained and is not void."""
    return next((run for run in runs if not run.failure and not run.parity), None)


def parity(run: TrainingRun, other: TrainingRun | None) -> str:
    """Why the losses of `run` make it void; empty where it learns, and as `other` does."""
    if run.failure:
        return ""
    first, last = run.losses[0], run.losses[-1]
    # NaN compares false.
    if not last < first:
        return f"Its loss did not fall: {first:.4f} at first, {last:.4f} at the end."
    if other is None:
        return ""
    tolerance = PARITY_TOLERANCE[run.dtype]
    pairs = zip(run.losses, other.losses, strict=False)
    for step, (own, wanted) in enumerate(pairs, start=1):
        if step > COMPARED_UPDATES:
            break
        if not math.isclose(own, wanted, rel_tol=tolerance):
            return (
                f"Its loss in update {step} is {own:.4f}, that of {other.contender} {wanted:.4f}, "
                f"which is not within {tolerance:g}."
            )
    return ""


def verdict(run: TrainingRun) -> str:
    """Whether the row counts."""
    if run.failure:
        return "failed"
    return "void" if run.parity else "valid"


def assumed_rates() -> Rates | None:
    """Those of this GPU by its name, where they are known."""
    if not has_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next((rates for part, rates in ASSUMED_RATES.items() if part in name.split()), None)
