"""Names of options: which there are, and which one a user most likely means."""

import dataclasses
import difflib
import re
import typing

from fastllama.config.options import Config, DataSource, Stage, ValidationSet

OTHER_NAMES = {
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.adam_eps",
    "bf16": "training.dtype",
    "block_size": "model.max_seq_len",
    "context_length": "model.max_seq_len",
    "d_model": "model.n_embd",
    "dim": "model.n_embd",
    "eval_iters": "training.eval_tokens",
    "eval_steps": "training.eval_interval",
    "fp16": "training.dtype",
    "global_batch_size": "training.tokens_per_update",
    "grad_norm_clip": "optimizer.grad_clip",
    "gradient_accumulation_steps": "training.tokens_per_update",
    "gradient_checkpointing": "training.activation_checkpointing",
    "hidden_size": "model.n_embd",
    "intermediate_size": "model.ffn_hidden",
    "learning_rate": "optimizer.max_lr",
    "local_batch_size": "training.batch_size",
    "logging_steps": "logging.log_interval",
    "lr": "optimizer.max_lr",
    "max_grad_norm": "optimizer.grad_clip",
    "max_iters": "training.training_tokens",
    "max_position_embeddings": "model.max_seq_len",
    "max_seq_length": "model.max_seq_len",
    "max_steps": "training.training_tokens",
    "max_tokens": "training.training_tokens",
    "micro_batch_size": "training.batch_size",
    "n_ctx": "model.max_seq_len",
    "n_head": "model.n_heads",
    "n_layer": "model.n_layers",
    "norm_eps": "model.eps",
    "num_attention_heads": "model.n_heads",
    "num_hidden_layers": "model.n_layers",
    "num_key_value_heads": "model.n_kv_heads",
    "num_train_epochs": "training.training_tokens",
    "per_device_train_batch_size": "training.batch_size",
    "precision": "training.dtype",
    "rms_norm_eps": "model.eps",
    "rope_theta": "model.theta",
    "save_interval": "checkpoint.interval_tokens",
    "save_steps": "checkpoint.interval_tokens",
    "save_total_limit": "checkpoint.keep_last",
    "seq_len": "model.max_seq_len",
    "seq_length": "model.max_seq_len",
    "sequence_length": "model.max_seq_len",
    "steps": "training.training_tokens",
    "sync_each_batch": "parallel.accumulate",
    "tie_word_embeddings": "model.tied_embeddings",
    "train_batch_size": "training.batch_size",
    "warmup_iters": "optimizer.warmup_iterations",
    "warmup_steps": "optimizer.warmup_iterations",
}
"""Our options by the names that other trainers and Hugging Face give them."""


ARRAYS = {"sources": DataSource, "validation": ValidationSet, "stages": Stage}
"""The arrays of tables in `data`, and the kind of their tables."""


def known_keys() -> list[str]:
    """Every option as `group.field`."""
    return [
        f"{group}.{option.name}"
        for group, kind in typing.get_type_hints(Config).items()
        for option in dataclasses.fields(kind)
    ]


def _table_keys(group: str) -> list[str]:
    """The options of a table in an array, such as `data.sources.0`."""
    array, _, number = group.rpartition(".")
    kind = ARRAYS.get(array.removeprefix("data."))
    if not number.isdecimal() or kind is None:
        return []
    return [f"{group}.{option.name}" for option in dataclasses.fields(kind)]


def missing_table(name: str, config: Config) -> str | None:
    """A sentence about an array such as `data.stages`, or a table that it lacks; or None."""
    found = re.match(rf"(data\.({'|'.join(ARRAYS)}))(\.\d+\b|$)", name)
    if found is None:
        return None
    array, kind, number = found.groups()
    if not number:
        option = {"sources": "weight", "validation": "path", "stages": "max-seq-len"}[kind]
        return (
            f"The recipe lists the entries of {array} as [[{array}]]; --{array}.0.{option} "
            "changes one."
        )
    count = len(getattr(config.data, kind))
    if int(number[1:]) < count:
        return None
    last = f" {'and' if count == 2 else 'to'} {count - 1}" if count > 1 else ""
    there = f"{count} entr{'ies' if last else 'y'}, 0{last}" if count else "no entries"
    return f"{array} has {there}; there is no {array}{number}."


def unknown_key(key: str, group: str | None = None) -> str:
    """A clause about an option that does not exist, with the one that is meant."""
    name = key if group is None else f"{group}.{key}"
    return f"unknown option {name}{nearest_key(name)}"


def nearest_key(name: str) -> str:
    """`; did you mean …?` for a name of another trainer, or a misspelt or misplaced option.

    A full stop if none is near.
    """
    group, _, field_name = name.rpartition(".")
    if ours := OTHER_NAMES.get(field_name):
        return f"; did you mean {ours}?"
    if not group and (near := difflib.get_close_matches(name, typing.get_type_hints(Config), n=1)):
        return f"; did you mean {near[0]}?"
    # Options of the named group come first, so that they win among equals.
    keys = sorted(
        _table_keys(group) + known_keys(), key=lambda key: not key.startswith(f"{group}.")
    )
    fields = [key.rpartition(".")[2] for key in keys]
    near = difflib.get_close_matches(field_name, fields, n=1)
    return f"; did you mean {keys[fields.index(near[0])]}?" if near else "."
