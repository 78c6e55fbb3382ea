"""Values derived from options, and options as dictionaries."""

import dataclasses

import pytest

from fastllama.config import Config, ModelConfig, config_from_dict
from tests.config.with_options import with_options


@pytest.mark.parametrize(
    ("n_embd", "multiple_of", "multiplier", "ffn_hidden"),
    [
        (768, 256, 1.0, 2048),
        (2048, 256, 1.0, 5632),  # 8/3 n_embd is 5461.3
        (4096, 1024, 1.3, 14336),
        (48, 64, 1.0, 128),  # 8/3 n_embd is 128, a multiple of 64
    ],
)
def test_feed_forward_width(
    n_embd: int, multiple_of: int, multiplier: float, ffn_hidden: int
) -> None:
    model = ModelConfig(n_embd=n_embd, multiple_of=multiple_of, ffn_multiplier=multiplier)
    assert model.ffn_width == ffn_hidden
    assert dataclasses.replace(model, ffn_hidden=100).ffn_width == 100


def test_derived_values() -> None:
    config = with_options(
        model__n_embd=64,
        model__n_heads=4,
        model__max_seq_len=16,
        training__batch_size=2,
        training__tokens_per_update=256,
        training__training_tokens=1025,
    )
    assert config.model.head_width == 16
    assert config.model.kv_heads == 4
    assert with_options(model__n_kv_heads=2).model.kv_heads == 2
    assert config.sequences_per_update == 16
    assert [config.accumulation_steps(world_size) for world_size in (1, 2, 8)] == [8, 4, 1]
    # The last update covers the one remaining token.
    assert config.n_updates == 5


def test_dictionary_round_trip() -> None:
    config = with_options(model__n_kv_heads=4, optimizer__schedule="wsd", data__path="somewhere")
    for expected in (Config(), config):
        assert config_from_dict(expected.to_dict(), source="test") == expected
    assert "n_kv_heads" not in Config().to_dict()["model"]
