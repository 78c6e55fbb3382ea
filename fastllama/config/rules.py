"""Rules of the values of options and between them, checked before anything is loaded."""

import dataclasses
import math
import re
from typing import Any

from fastllama.config.options import Config, DataConfig, ModelConfig, TrainingConfig


def validate(config: Config, world_size: int = 1) -> None:
    """Reject values that cannot work on `world_size` processes.

    Raises:
        ValueError: one sentence with the values and the remedy.
    """
    validate_values(config)
    _validate_replicas(config, world_size)
    _validate_batches(config, world_size)


def validate_values(config: Config) -> None:
    """Reject values that cannot work on any number of processes.

    Raises:
        ValueError: one sentence with the values and the remedy.
    """
    for group in dataclasses.fields(config):
        for key, value in vars(getattr(config, group.name)).items():
            _validate_representable(f"{group.name}.{key}", value)
    _validate_ranges(config)
    _validate_sources(config.data)
    _validate_stages(config)
    _validate_model(config.model)
    _validate_optimizer(config)
    _validate_skipped_steps(config.training)
    if (upload := config.checkpoint.upload) and not re.match(r"[A-Za-z][\w.+-]*://", upload):
        raise ValueError(
            f"checkpoint.upload = {upload!r} is not a URL; give one such as s3://bucket/runs, or "
            "for a folder file:///path."
        )
    training = config.training
    if training.save_projection_inputs and training.activation_checkpointing != "none":
        raise ValueError(
            "training.save_projection_inputs = true saves what training.activation_checkpointing = "
            f'"{training.activation_checkpointing}" recomputes; give one of the two.'
        )
    if training.init_moments and not training.init_from:
        raise ValueError(
            "training.init_moments takes the moments of training.init_from, which is empty; give "
            "both."
        )


MAX_INTEGER = 2**63 - 1
"""Largest integer that PyTorch, NumPy and the files of a run all hold."""


def _validate_representable(name: str, value: Any) -> None:
    if isinstance(value, tuple):
        for number, item in enumerate(value):
            fields = vars(item) if dataclasses.is_dataclass(item) else {"": item}
            for key, element in fields.items():
                _validate_representable(f"{name}.{number}.{key}".rstrip("."), element)
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        size = f"about 10^{math.floor(value.bit_length() * math.log10(2))}"
        raise ValueError(f"{name} must be at most {MAX_INTEGER}, and it is {size}.")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{name} = {value!r} is not valid UTF-8; type it in a UTF-8 terminal, or rename "
                "the file or folder."
            ) from None
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name} = {value!r} contains a NUL character; remove it.")


_AT_LEAST_ONE = (
    "model.vocab_size",
    "model.n_embd",
    "model.n_layers",
    "model.n_heads",
    "model.multiple_of",
    "model.max_seq_len",
    "model.rope_original_max_seq_len",
    "data.prefetch",
    "training.batch_size",
    "training.tokens_per_update",
    "training.training_tokens",
    "training.eval_tokens",
    "training.max_bad_updates",
    "parallel.replicate",
    "checkpoint.keep_last",
    "logging.log_interval",
    "logging.sample_growth",
    "logging.sample_tokens",
    "model.rope_scaling_factor",
)
_AT_MOST = {
    # More would take all memory.
    "model.ffn_multiplier": 1_000,
    "data.prefetch": 1_000,
    # Near the end of float32, the bounded logits are not finite.
    "model.logit_softcap": 1e9,
    # A year: PyTorch counts nanoseconds of 64 bits.
    "parallel.timeout_minutes": 525_600,
}
_POSITIVE = (
    "model.ffn_multiplier",
    "model.eps",
    "model.theta",
    "model.rope_low_freq_factor",
    "model.rope_high_freq_factor",
    "optimizer.max_lr",
    "optimizer.adam_eps",
    "parallel.timeout_minutes",
    "data.cache_gb",
)
_NOT_NEGATIVE = (
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.warmup_iterations",
    "optimizer.grad_clip",
    "training.z_loss",
    "training.eval_interval",
    "training.seed",
    "training.spike_z_score",
    "training.rewind_after",
    "training.max_wall_time",
    "checkpoint.interval_tokens",
    "checkpoint.keep_every_tokens",
    "logging.sample_interval",
)
_FRACTIONS = (
    "model.dropout",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.decay_fraction",
    "training.label_smoothing",
    "training.ema_decay",
)


def _validate_ranges(config: Config) -> None:
    rules = (
        (_AT_LEAST_ONE, "at least 1", lambda value: value >= 1),
        (_POSITIVE, "greater than 0", lambda value: value > 0),
        (_NOT_NEGATIVE, "0 or more", lambda value: value >= 0),
        (_FRACTIONS, "at least 0 and less than 1", lambda value: 0 <= value < 1),
    )
    for names, wording, holds in rules:
        for name in names:
            group, _, key = name.partition(".")
            value = getattr(getattr(config, group), key)
            if not (math.isfinite(value) and holds(value)):
                finite = " and finite" if value == math.inf else ""
                raise ValueError(f"{name} must be {wording}{finite}, not {value}.")
    for name, most in _AT_MOST.items():
        group, _, key = name.partition(".")
        value = getattr(getattr(config, group), key)
        if value is not None and value > most:
            raise ValueError(f"{name} must be at most {most:,}, not {value}.")


def _validate_sources(data: DataConfig) -> None:
    if data.path and data.sources:
        raise ValueError(
            f"data.path = {data.path} names one data folder and data.sources several; give one of "
            "them."
        )
    for number, source in enumerate(data.sources):
        name = f"data.sources.{number}"
        if not source.path:
            raise ValueError(f"{name}.path is empty; give the folder that fastllama prepare wrote.")
        for option in ("weight", "max_epochs"):
            value = getattr(source, option)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}.{option} must be 0 or more, not {value}.")
    for number, held_out in enumerate(data.validation):
        if not held_out.path:
            raise ValueError(
                f"data.validation.{number}.path is empty; give the folder that fastllama prepare "
                "wrote."
            )
    _validate_weights("data.sources", tuple(source.weight for source in data.sources))
    for array, names in (
        ("data.sources", data.source_names),
        ("data.validation", data.validation_names if data.validation else []),
    ):
        for number, name in enumerate(names):
            if not re.fullmatch(r"[\w.@+-]{1,60}", name):
                raise ValueError(
                    f"{array}.{number}.name = {name!r} cannot be the name of a column; give a name "
                    "of letters, digits, '.', '_' and '-'."
                )
            if name in names[:number]:
                raise ValueError(
                    f"{array}.{number} and {array}.{names.index(name)} are both named {name}; give "
                    f"{array}.{number}.name."
                )


def _validate_weights(name: str, weights: tuple[float, ...]) -> None:
    if weights and not any(weights):
        raise ValueError(f"All weights of {name} are 0; give one source a weight above 0.")


def _validate_stages(config: Config) -> None:
    n_sources = len(config.data.sources)
    before = 1
    for number, stage in enumerate(config.data.stages):
        name = f"data.stages.{number}"
        for option in ("max_seq_len", "batch_size", "theta"):
            value = getattr(stage, option)
            if value is not None and not (
                value >= 1 if option != "theta" else 0 < value < math.inf
            ):
                least = "greater than 0" if option == "theta" else "at least 1"
                raise ValueError(f"{name}.{option} must be {least}, not {value}.")
        if stage.start_tokens == 0:
            raise ValueError(
                f"{name}.start_tokens is 0 or missing; give the tokens of the run after which the "
                "stage begins."
            )
        first = config.first_step(stage)
        if first <= before:
            start = "the run" if number == 0 else f"data.stages.{number - 1}"
            raise ValueError(
                f"{name}.start_tokens = {stage.start_tokens} is not after the first update of "
                f"{start}; stages are in the order of their start, and the options outside of "
                "data.stages are those of the beginning."
            )
        if first > config.n_updates:
            raise ValueError(
                f"{name}.start_tokens = {stage.start_tokens} begins after the last update, "
                f"{config.n_updates} of {config.training.tokens_per_update} tokens; lower it, or "
                "raise training.training_tokens."
            )
        if stage.weights and len(stage.weights) != n_sources:
            raise ValueError(
                f"{name}.weights has {len(stage.weights)} numbers, and there are {n_sources} "
                "data.sources; give one weight for each source."
            )
        for weight in stage.weights:
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}.weights must be 0 or more, not {weight}.")
        _validate_weights(f"{name}.weights", stage.weights)
        seq_len = config.at(first).model.max_seq_len
        if config.longest_seq_len % seq_len:
            raise ValueError(
                f"{name} trains on sequences of {seq_len} tokens, which do not divide the longest, "
                f"{config.longest_seq_len}; choose a divisor, such as a power of two."
            )
        before = first
    first_len, longest = config.model.max_seq_len, config.longest_seq_len
    if longest % first_len:
        number = [stage.max_seq_len for stage in config.data.stages].index(longest)
        raise ValueError(
            f"data.stages.{number}.max_seq_len = {longest} is not a multiple of "
            f"model.max_seq_len = {first_len}; the nearest that is: "
            f"{round(longest / first_len) * first_len}."
        )


def _validate_model(model: ModelConfig) -> None:
    for name in ("n_kv_heads", "head_dim", "ffn_hidden"):
        value = getattr(model, name)
        if value is not None and value < 1:
            raise ValueError(f"model.{name} must be at least 1, not {value}.")
    if model.head_dim is None and model.n_embd % model.n_heads:
        raise ValueError(
            f"model.n_heads = {model.n_heads} does not divide model.n_embd = {model.n_embd}; "
            "choose a width that is a multiple of the heads, or set model.head_dim."
        )
    if model.head_width % 2:
        name = "n_embd / model.n_heads" if model.head_dim is None else "head_dim"
        raise ValueError(
            f"model.{name} = {model.head_width} is odd, and rotary embeddings rotate pairs; choose "
            "an even head width."
        )
    if model.ffn_hidden is not None and model.ffn_multiplier != 1:
        raise ValueError(
            f"model.ffn_hidden = {model.ffn_hidden} is the feed-forward width, and "
            f"model.ffn_multiplier = {model.ffn_multiplier} would choose it; give one of them."
        )
    if model.n_heads % model.kv_heads:
        raise ValueError(
            f"model.n_kv_heads = {model.kv_heads} does not divide model.n_heads = "
            f"{model.n_heads}; each key/value head serves the same number of query heads."
        )
    if model.logit_softcap is not None and not 0 < model.logit_softcap < math.inf:
        raise ValueError(
            f"model.logit_softcap must be greater than 0, not {model.logit_softcap}; leave it out "
            "for unbounded logits."
        )
    if model.rope_scaling_factor > 1 and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        raise ValueError(
            f"model.rope_low_freq_factor = {model.rope_low_freq_factor} must be less than "
            f"model.rope_high_freq_factor = {model.rope_high_freq_factor}."
        )


def _validate_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.schedule != "constant" and optimizer.min_lr > optimizer.max_lr:
        raise ValueError(
            f"optimizer.min_lr = {optimizer.min_lr} is greater than optimizer.max_lr = "
            f"{optimizer.max_lr}; swap them or lower min_lr."
        )
    if optimizer.warmup_iterations >= config.n_updates:
        raise ValueError(
            f"optimizer.warmup_iterations = {optimizer.warmup_iterations} leaves nothing of the "
            f"{config.n_updates} updates of this run; lower it or raise training.training_tokens."
        )


def _validate_replicas(config: Config, world_size: int) -> None:
    replicate = config.parallel.replicate
    if world_size % replicate:
        raise ValueError(
            f"parallel.replicate = {replicate} does not divide the {world_size} processes; each "
            "replica is a group of the same size, so choose a divisor, such as the number of nodes."
        )


def _validate_skipped_steps(training: TrainingConfig) -> None:
    if training.rewind_after > training.max_bad_updates:
        raise ValueError(
            f"training.rewind_after = {training.rewind_after} is never reached: the run stops "
            f"after training.max_bad_updates = {training.max_bad_updates}; lower it, or raise "
            "training.max_bad_updates."
        )


def _validate_batches(config: Config, world_size: int) -> None:
    tokens = config.training.tokens_per_update
    micro_batches = [
        stage.training.batch_size * stage.model.max_seq_len * world_size for stage in config.stages
    ]
    for number, (stage, micro_batch) in enumerate(zip(config.stages, micro_batches, strict=True)):
        if not tokens % micro_batch:
            continue
        every = math.lcm(*micro_batches)
        nearest = max(1, round(tokens / every)) * every
        name = f"data.stages.{number - 1}" if number else "training"
        batch_size, sequence = stage.training.batch_size, stage.model.max_seq_len
        sequences, rest = divmod(tokens, sequence * world_size)
        smaller = ""
        if not rest:
            # Same updates, in smaller micro-batches.
            smaller = f", or set {name}.batch_size = {math.gcd(batch_size, sequences)}"
        raise ValueError(
            f"training.tokens_per_update = {tokens} is not a multiple of batch_size x max_seq_len "
            f"x devices{f' of {name}' if number else ''} = {batch_size} x {sequence} x "
            f"{world_size} = {micro_batch}; the nearest that is: {nearest}{smaller}."
        )
