"""When validation, samples and checkpoints are due."""

import dataclasses

from fastllama.config import CheckpointConfig, Config, LoggingConfig, ModelConfig, TrainingConfig
from fastllama.training.side_jobs import checkpoint_due, sample_due, validation_due

CONFIG = Config(
    model=ModelConfig(max_seq_len=10),
    training=TrainingConfig(
        batch_size=1, tokens_per_update=100, training_tokens=10_000, eval_interval=30
    ),
    checkpoint=CheckpointConfig(interval_tokens=2_500),
    logging=LoggingConfig(sample_interval=8, sample_growth=1.5),
)


def test_validation_is_due_at_intervals_and_at_the_end() -> None:
    assert [step for step in range(1, 101) if validation_due(step, CONFIG)] == [30, 60, 90, 100]
    never = dataclasses.replace(
        CONFIG, training=dataclasses.replace(CONFIG.training, eval_interval=0)
    )
    assert not any(validation_due(step, never) for step in range(1, 101))


def test_sample_intervals_grow() -> None:
    # Intervals of 8, 12, 18 and 27. The next one, 40.5 rounded to 40, ends after the last update.
    assert [step for step in range(1, 101) if sample_due(step, CONFIG)] == [8, 20, 38, 65, 100]
    never = dataclasses.replace(CONFIG, logging=LoggingConfig(sample_interval=0))
    assert not any(sample_due(step, never) for step in range(1, 101))


def test_checkpoint_is_due_at_multiples_of_tokens() -> None:
    assert [step for step in range(1, 101) if checkpoint_due(step, CONFIG)] == [25, 50, 75, 100]
    uneven = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(interval_tokens=1_990))
    # The multiples 1,990, 3,980, … lie inside an update of 100 tokens, and that update is due.
    assert [step for step in range(1, 101) if checkpoint_due(step, uneven)] == [20, 40, 60, 80, 100]
    never = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(interval_tokens=0))
    assert not any(checkpoint_due(step, never) for step in range(1, 101))
