"""The names of options."""

from fastllama.config import known_keys

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
    training.compile_scope training.activation_checkpointing training.kernels training.attention
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
