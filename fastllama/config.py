"""The options of a run: typed groups, TOML recipes with `extends`, and the rules between values.

Precedence: the defaults below, then the recipe that a recipe extends, then the recipe, then the
command line. A field is a user's choice; a property follows from fields. Standard library only, so
that the command line answers at once.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

Group = TypeVar("Group")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the LLaMA."""

    vocab_size: int = 8192
    """Rows of the embedding and the output projection; at least the tokenizer's entries."""
    n_embd: int = 768
    """Width of the residual stream."""
    n_layers: int = 12
    """Decoder blocks."""
    n_heads: int = 12
    """Query heads; the head width is n_embd / n_heads."""
    n_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); None means n_heads."""
    multiple_of: int = 256
    """The feed-forward width is rounded up to a multiple of this."""
    ffn_multiplier: float = 1.0
    """Scales the feed-forward width of 8/3 n_embd before rounding."""
    eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    theta: float = 10000.0
    """Base of the rotary frequencies."""
    dropout: float = 0.0
    """Probability of dropping an element of each residual branch."""
    max_seq_len: int = 1024
    """Tokens in a training sequence."""
    tied_embeddings: bool = False
    """Use the embedding as the output projection."""
    logit_softcap: float | None = None
    """Soft bound c of the logits, c * tanh(logits / c), as in Gemma 2; None does not bound them."""
    rope_scaling_factor: float = 1.0
    """Llama 3 scaling of the rotary frequencies; 1 does not scale."""
    rope_low_freq_factor: float = 1.0
    """Llama 3 scaling: wavelengths above context / this are divided by the factor."""
    rope_high_freq_factor: float = 4.0
    """Llama 3 scaling: wavelengths below context / this do not change."""
    rope_original_max_seq_len: int = 8192
    """Llama 3 scaling: the context that both factors refer to."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with None resolved."""
        return self.n_kv_heads or self.n_heads

    @property
    def ffn_hidden(self) -> int:
        """Width of the SwiGLU hidden layer, by the rule in Meta's LLaMA code."""
        hidden = int(self.ffn_multiplier * int(8 * self.n_embd / 3))
        return self.multiple_of * math.ceil(hidden / self.multiple_of)


@dataclass(frozen=True)
class DataConfig:
    """Token shards to train on."""

    path: str = ""
    """Folder written by `fastllama prepare`."""
    tokenizer: str = ""
    """A tokenizer.json that the data must have been prepared with; empty accepts any."""
    prefetch: int = 4
    """Micro-batches to read ahead."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    max_lr: float = 3e-4
    """Learning rate after warm-up."""
    min_lr: float = 3e-5
    """Learning rate at the end."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the decay from max_lr to min_lr; wsd holds max_lr, then decays."""
    warmup_iterations: int = 100
    """Updates over which the learning rate rises linearly from 0."""
    decay_fraction: float = 0.2
    """Fraction of the updates over which wsd decays."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; norms and embeddings are not decayed."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 never clips."""


@dataclass(frozen=True)
class TrainingConfig:
    """How much is trained, how it is computed, and when it stops."""

    # Batches.
    batch_size: int = 4
    """Sequences in one micro-batch of one device."""
    tokens_per_update: int = 2**19
    """Tokens in one optimizer update over all devices; micro-batches accumulate to it."""
    training_tokens: int = 1_000_000_000
    """Tokens of the whole run."""
    seed: int = 1337
    """Seed of the weights, the data order, dropout and the samples."""

    # The loss.
    z_loss: float = 0.0
    """Weight of the mean squared log-normalizer in the training loss; PaLM uses 1e-4."""
    label_smoothing: float = 0.0
    """Share of the training loss that is spread evenly over the vocabulary."""

    # Validation.
    eval_interval: int = 250
    """Updates between validations; 0 never validates."""
    eval_tokens: int = 2**20
    """Tokens of one validation, at most the whole held-out split."""

    # Computation.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type; parameters, moments and reductions are float32."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA if there is a GPU."""
    compile: bool = True
    """torch.compile the model."""
    compile_scope: Literal["block", "model"] = "block"
    """Compile the blocks, which share two graphs, or the whole model."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a block saves: all; attention and matmuls except gate_up; or its inputs only."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Operators of the model: Triton kernels or plain PyTorch; auto takes Triton on CUDA."""
    attention: Literal[
        "auto", "flash-attn-3", "flash-attn-4", "flash-attn-2", "cudnn", "flash", "reference"
    ] = "auto"
    """Attention backend; auto measures the installed ones once and takes the fastest."""
    deterministic: bool = False
    """Compute the same bits in every run of this configuration; slower on CUDA."""

    # Skipped updates.
    spike_z_score: float = 0.0
    """Skip updates whose loss or gradient norm is this many deviations above its mean; 0 is off."""
    max_bad_updates: int = 10
    """Stop after this many skipped updates in a row."""
    rewind_after: int = 0
    """After this many skipped updates in a row, rewind, and continue past their data; 0 is off."""

    # Stopping.
    max_wall_time: float = 0.0
    """Minutes after which the run saves and stops with exit code 85; 0 sets no limit."""


@dataclass(frozen=True)
class ParallelConfig:
    """FSDP2 over the processes torchrun starts."""

    replicate: int = 1
    """Replicas of the model (HSDP), each sharded over a group of processes; 1 shards over all."""
    reshard_after_forward: Literal["auto", True, False] = "auto"
    """Free gathered parameters after the forward, to save memory; auto asks the memory plan."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed over micro-batches and devices."""
    timeout_minutes: float = 10.0
    """Minutes that a collective may wait before the run ends."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run can resume from."""

    interval_tokens: int = 250_000_000
    """Tokens between checkpoints; 0 saves only at the end."""
    keep_last: int = 3
    """Number of newest checkpoints to keep; older ones are removed."""
    keep_every_tokens: int = 0
    """Also keep, for good, the first checkpoint at or after each multiple of this; 0 keeps none."""


@dataclass(frozen=True)
class LoggingConfig:
    """What a run logs."""

    log_interval: int = 10
    """Updates between log rows."""
    sample_interval: int = 32
    """Updates before the second sample; 0 never samples."""
    sample_growth: float = 1.5
    """Factor by which the interval between samples grows each time."""
    sample_prompt: str = "The "
    """Text that the samples continue."""
    sample_tokens: int = 64
    """Tokens in a sample."""
    tensorboard: bool = True
    """Also write TensorBoard events."""


@dataclass(frozen=True)
class Config:
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def n_updates(self) -> int:
        """Optimizer updates that cover `training_tokens`."""
        return math.ceil(self.training.training_tokens / self.training.tokens_per_update)

    @property
    def sequences_per_update(self) -> int:
        """Sequences in one optimizer update over all devices."""
        return self.training.tokens_per_update // self.model.max_seq_len

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches each of `world_size` devices accumulates into one update."""
        return self.sequences_per_update // (self.training.batch_size * world_size)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The groups as TOML can hold them; a field that is None is left out."""
        return {
            group: {key: value for key, value in fields.items() if value is not None}
            for group, fields in dataclasses.asdict(self).items()
        }


def load_recipe(path: Path) -> Config:
    """Read a TOML recipe and what it extends.

    Raises:
        ValueError: the file is missing, is not TOML, extends itself, or has an unknown key or a
            value of another type.
    """
    return config_from_dict(_read_with_base(path, seen=()), source=str(path))


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ValueError(f"{path} extends itself; remove one `extends` of the cycle.")
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"There is no recipe {path}; see the folder configs.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"The recipe {path} cannot be read as TOML: {error}.") from None
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: extends must be the path of one recipe, not {base!r}.")
    return _merge(_read_with_base(path.parent / base, (*seen, path.resolve())), values)


def _merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def config_from_dict(values: dict[str, Any], source: str) -> Config:
    """Build a `Config` from nested dictionaries; `source` names them in errors.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value of another type.
    """
    groups = typing.get_type_hints(Config)
    built = {}
    for name, group in values.items():
        if name not in groups or not isinstance(group, dict):
            raise ValueError(f"{source}: {_unknown_key(name)}")
        built[name] = _group_from_dict(groups[name], name, group, source)
    return Config(**built)


def _group_from_dict(
    group: type[Group], group_name: str, values: dict[str, Any], source: str
) -> Group:
    hints = typing.get_type_hints(group)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{source}: {_unknown_key(key, group_name)}")
        if not _has_type(value, hints[key]):
            raise ValueError(
                f"{source}: {group_name}.{key} must be {_type_name(hints[key])}, not {value!r}."
            )
    return group(**values)


def _has_type(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        # 1 == True, but 1 is not a boolean.
        return any(value == known and type(value) is type(known) for known in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, option) for option in typing.get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(_literal_name(value) for value in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(
        hint, "left out"
    )


def _literal_name(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def known_keys() -> list[str]:
    """Every option as `group.field`."""
    return [
        f"{group}.{option.name}"
        for group, kind in typing.get_type_hints(Config).items()
        for option in dataclasses.fields(kind)
    ]


def takes_booleans(name: str) -> bool:
    """Whether the option `group.field` takes `true` and `false`; False if there is none."""
    group, _, key = name.partition(".")
    kind = typing.get_type_hints(Config).get(group)
    return kind is not None and _has_type(True, typing.get_type_hints(kind).get(key))


def _unknown_key(key: str, group: str | None = None) -> str:
    name = key if group is None else f"{group}.{key}"
    return f"unknown option {name}{nearest_key(name)}"


def nearest_key(name: str) -> str:
    """`; did you mean …?` for a misspelt or misplaced option; a full stop if none is near."""
    group, _, field_name = name.rpartition(".")
    if not group and (near := difflib.get_close_matches(name, typing.get_type_hints(Config), n=1)):
        return f"; did you mean {near[0]}?"
    # Options of the named group come first, so that they win among equals.
    keys = sorted(known_keys(), key=lambda key: not key.startswith(f"{group}."))
    fields = [key.rpartition(".")[2] for key in keys]
    near = difflib.get_close_matches(field_name, fields, n=1)
    return f"; did you mean {keys[fields.index(near[0])]}?" if near else "."


def validate(config: Config, world_size: int = 1) -> None:
    """Reject values that cannot work, before anything is loaded.

    Raises:
        ValueError: one sentence with the values and the remedy.
    """
    _validate_ranges(config)
    _validate_model(config.model)
    _validate_optimizer(config)
    _validate_replicas(config, world_size)
    _validate_skipped_steps(config.training)
    _validate_batches(config, world_size)


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
_POSITIVE = (
    "model.ffn_multiplier",
    "model.eps",
    "model.theta",
    "model.rope_low_freq_factor",
    "model.rope_high_freq_factor",
    "optimizer.max_lr",
    "optimizer.adam_eps",
    "parallel.timeout_minutes",
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
                raise ValueError(f"{name} must be {wording}, not {value}.")


def _validate_model(model: ModelConfig) -> None:
    if model.n_embd % model.n_heads:
        raise ValueError(
            f"model.n_heads = {model.n_heads} does not divide model.n_embd = {model.n_embd}; "
            "choose a width that is a multiple of the heads."
        )
    if model.head_dim % 2:
        raise ValueError(
            f"model.n_embd / model.n_heads = {model.head_dim} is odd, and rotary embeddings rotate "
            "pairs; choose an even head width."
        )
    if model.n_kv_heads is not None and model.n_kv_heads < 1:
        raise ValueError(f"model.n_kv_heads must be at least 1, not {model.n_kv_heads}.")
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
    training, sequence = config.training, config.model.max_seq_len
    micro_batch = training.batch_size * sequence * world_size
    if training.tokens_per_update % micro_batch:
        raise ValueError(
            f"training.tokens_per_update = {training.tokens_per_update} is not a multiple of "
            f"batch_size x max_seq_len x devices = {training.batch_size} x {sequence} x "
            f"{world_size} = {micro_batch}; the nearest that is: "
            f"{max(1, round(training.tokens_per_update / micro_batch)) * micro_batch}."
        )
