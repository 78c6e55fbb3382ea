"""Builds a contender's row of results and checks the parity of its losses."""

import math
from collections.abc import Sequence

import torch

from benchmarks.conditions import has_gpu
from benchmarks.results import Spread, TrainingRun
from benchmarks.training.job import Outcome
from fastllama.config import Config
from fastllama.planning.bound import DEVICE_RATES, Rates, bound
from fastllama.planning.flops import (
    flops_per_token,
    hardware_flops_per_token,
    n_parameters,
    peak_flops,
)

PARITY_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Relative tolerance between the losses of two contenders.

A bfloat16 value is off by up to 2^-9. A loss averages over all tokens of an update, where such
errors mostly cancel: four contenders at the rehearsal's shape, in bfloat16 on a CPU, stay within
1.3e-4 for 13 updates. The tolerance leaves room for larger models; float32 gives the sharp test.
"""
COMPARED_UPDATES = 20
"""Updates whose losses are compared. Later, rounding alone can make two runs diverge."""


def training_run(
    contender: str, recipe: str, config: Config, outcome: Outcome, rates: Rates | None
) -> TrainingRun:
    """Row for an outcome. `parity` stays empty; the caller sets it."""
    model, training = config.model, config.training
    spread = None if outcome.failure else Spread.of(outcome.update_seconds)
    tok_per_s = None if spread is None else training.tokens_per_update / spread.median
    peak = peak_flops(torch.cuda.get_device_name()) if has_gpu() else None

    def utilisation(flops: float) -> float | None:
        return None if peak is None or tok_per_s is None else flops * tok_per_s / peak

    # The rates are measured in bfloat16.
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
    """The run whose losses the others must match: the first one that is neither failed nor void."""
    return next((run for run in runs if not run.failure and not run.parity), None)


def parity(run: TrainingRun, other: TrainingRun | None) -> str:
    """Reason why `run` is void; empty if its loss falls and matches the losses of `other`."""
    if run.failure:
        return ""
    first, last = run.losses[0], run.losses[-1]
    # Written so that a NaN fails the check.
    if not last < first:
        return f"The loss did not fall: first {first:.4f}, last {last:.4f}."
    if other is None:
        return ""
    tolerance = PARITY_TOLERANCE[run.dtype]
    pairs = zip(run.losses, other.losses, strict=False)
    for step, (own, wanted) in enumerate(pairs, start=1):
        if step > COMPARED_UPDATES:
            break
        if not math.isclose(own, wanted, rel_tol=tolerance):
            return (
                f"The loss of update {step} is {own:.4f}, but {wanted:.4f} for "
                f"{other.contender}; the relative tolerance is {tolerance:g}."
            )
    return ""


def verdict(run: TrainingRun) -> str:
    """failed, void or valid."""
    if run.failure:
        return "failed"
    return "void" if run.parity else "valid"


def known_rates() -> Rates | None:
    """Rates of this GPU, looked up by its name; None on a CPU or an unknown GPU."""
    if not has_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next((rates for part, rates in DEVICE_RATES.items() if part in name.split()), None)
