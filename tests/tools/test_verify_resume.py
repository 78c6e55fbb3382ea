"""The comparison of `fastllama verify-resume` on given losses."""

import math

import pytest

from fastllama.config import Config, ParallelConfig, TrainingConfig
from fastllama.tools.verify_resume import Comparison, Plan, shortened, tolerance, verdict

SAME, OTHER = Plan(4, 2, 2, 2), Plan(4, 2, 2, 1)
LOSSES = [4.0, 3.0, 2.0, 1.0]
FLOAT32 = Config(training=TrainingConfig(dtype="float32"))
DETERMINISTIC = Config(training=TrainingConfig(deterministic=True))


def compare(changed: dict[int, float], allowed: float) -> Comparison:
    """`LOSSES` against a copy with other losses for some updates."""
    other = [changed.get(step, loss) for step, loss in enumerate(LOSSES, 1)]
    return Comparison(LOSSES, other, allowed, resumed_from=1)


def test_same_bits() -> None:
    comparison = compare({}, 0.0)
    assert comparison.first_mismatch is None
    sentence = (
        "same: the losses of all 4 updates are bit-identical (2 processes, then 2 processes)."
    )
    assert verdict(comparison, FLOAT32, SAME) == sentence


def test_one_bit_differs_on_the_same_processes() -> None:
    comparison = compare({3: math.nextafter(2.0, 3.0)}, tolerance(FLOAT32, SAME))
    assert comparison.first_mismatch == 3
    sentence = verdict(comparison, FLOAT32, SAME)
    assert sentence.startswith("different: the losses of update 3 differ by 2.2e-16, where ")
    assert "they must be bit-identical (2 processes, then 2 processes)." in sentence
    assert sentence.endswith("On CUDA, try --training.deterministic true.")
    assert "deterministic" not in verdict(comparison, DETERMINISTIC, SAME)


def test_rounding_is_allowed_on_other_processes() -> None:
    allowed = tolerance(FLOAT32, OTHER)
    near = compare({2: 3.0 + 2e-6}, allowed)
    assert near.first_mismatch is None
    sentence = verdict(near, FLOAT32, OTHER)
    assert "at most 6.7e-07, in update 2, where 1e-06 is allowed" in sentence
    assert "(2 processes, then 1 process)" in sentence
    # Too much for update 2, the first after the resume, but not for update 4.
    grown = compare({4: 1.0 + 3e-6}, allowed)
    assert grown.first_mismatch is None
    far = compare({2: 3.0 + 6e-6, 4: 1.0 + 3e-6}, allowed)
    assert far.first_mismatch == 2
    sentence = verdict(far, FLOAT32, OTHER)
    assert "losses of update 2 differ by 2e-06, where 1e-06 is allowed" in sentence


def test_tolerance_grows_to_a_limit() -> None:
    comparison = Comparison([], [], 1e-6, resumed_from=4)
    allowed = [comparison.allowed(step) for step in (1, 5, 6, 8, 100)]
    assert allowed == pytest.approx([1e-6, 1e-6, 2e-6, 8e-6, 1e-2])
    assert Comparison([], [], 0.0, resumed_from=4).allowed(100) == 0.0


def test_bfloat16_widens_the_tolerance() -> None:
    reduced = Config(
        training=TrainingConfig(dtype="float32"), parallel=ParallelConfig(reduce_dtype="bfloat16")
    )
    assert tolerance(Config(), OTHER) == tolerance(reduced, OTHER) == 1e-3
    assert tolerance(Config(), SAME) == 0.0


def test_losses_that_are_not_finite() -> None:
    for one, other, mismatch in (
        (math.nan, math.nan, None),
        (math.inf, math.inf, None),
        (math.nan, 1.0, 1),
        (1.0, math.inf, 1),
        (0.0, 1.0, 1),
    ):
        assert Comparison([one], [other], 1e-3, resumed_from=0).first_mismatch == mismatch


def test_table_has_a_line_per_update() -> None:
    header, *lines = compare({2: 3.3}, 0.0).table().splitlines()
    assert header.split() == ["step", "uninterrupted", "resumed", "difference"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]
    assert lines[1].split() == ["2", "3.000000000", "3.300000000", "0.1"]


def test_shortened_training_saves_before_the_kill() -> None:
    plan = Plan(steps=20, interrupt_at=10, processes=1, resume_processes=1)
    config = shortened(Config(), plan)
    assert config.n_updates == 20
    assert config.optimizer.warmup_iterations == 10
    assert config.checkpoint.interval_tokens == 6 * config.training.tokens_per_update
    assert config.model == Config().model
