"""The names of options."""

import pytest

from fastllama.config import (
    Config,
    DataConfig,
    DataSource,
    Stage,
    ValidationSet,
    known_keys,
    missing_table,
)

# Adding, renaming or removing an option changes the meaning of old runs and recipes, so this list
# must change too.
OPTIONS = """
    model.vocab_size model.n_embd model.n_layers model.n_heads model.n_kv_heads model.head_dim
    model.ffn_hidden model.multiple_of model.ffn_multiplier model.eps model.theta
    model.dropout model.max_seq_len
    model.tied_embeddings model.logit_softcap model.rope_scaling_factor
    model.rope_low_freq_factor model.rope_high_freq_factor model.rope_original_max_seq_len
    data.path data.tokenizer data.prefetch data.cache_dir data.cache_gb data.document_mask
    data.sources data.validation data.stages
    optimizer.max_lr optimizer.min_lr optimizer.schedule optimizer.warmup_iterations
    optimizer.decay_fraction optimizer.beta1 optimizer.beta2 optimizer.adam_eps
    optimizer.weight_decay optimizer.grad_clip
    training.batch_size training.tokens_per_update training.training_tokens training.seed
    training.init_from training.init_moments
    training.z_loss training.label_smoothing training.eval_interval training.eval_tokens
    training.dtype training.device training.compile
    training.compile_scope training.activation_checkpointing training.save_projection_inputs
    training.kernels training.attention
    training.deterministic training.ema_decay training.spike_z_score
    training.max_bad_updates training.rewind_after
    training.max_wall_time
    parallel.replicate parallel.reshard_after_forward parallel.accumulate parallel.reduce_dtype
    parallel.timeout_minutes
    checkpoint.interval_tokens checkpoint.keep_last checkpoint.keep_every_tokens
    checkpoint.upload
    logging.log_interval logging.sample_interval logging.sample_growth logging.sample_prompt
    logging.sample_tokens logging.tensorboard
"""


def test_known_keys() -> None:
    assert known_keys() == OPTIONS.split()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "data.sources.2.weight",
            "data.sources has 2 entries, 0 and 1; there is no data.sources.2.",
        ),
        ("data.stages.7", "data.stages has 3 entries, 0 to 2; there is no data.stages.7."),
        ("data.validation.10.x", "data.validation has 1 entry, 0; there is no data.validation.10."),
        ("data.sources.1.wieght", None),
        ("data.path", None),
        ("model.stages", None),
    ],
)
def test_table_that_a_recipe_lacks(name: str, sentence: str | None) -> None:
    sources = (DataSource("a"), DataSource("b"))
    data = DataConfig(sources=sources, validation=(ValidationSet("c"),), stages=(Stage(),) * 3)
    assert missing_table(name, Config(data=data)) == sentence
