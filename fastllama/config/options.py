"""The options of a run, in typed groups.

A field is a user's choice; a property follows from fields. Defaults are here. A recipe overrides
them, and the command line overrides a recipe.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal


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
    """Query heads."""
    n_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); None means n_heads."""
    head_dim: int | None = None
    """Width of a head; None means n_embd / n_heads."""
    ffn_hidden: int | None = None
    """Feed-forward width; None means 8/3 n_embd, scaled and rounded by the next two options."""
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
    """Llama 3 scaling: divides frequencies of wavelengths above context / this by the factor."""
    rope_high_freq_factor: float = 4.0
    """Llama 3 scaling: keeps frequencies of wavelengths below context / this."""
    rope_original_max_seq_len: int = 8192
    """Llama 3 scaling: the context that both factors refer to."""

    @property
    def head_width(self) -> int:
        """Width of one attention head, with None resolved."""
        return self.head_dim or self.n_embd // self.n_heads

    @property
    def attention_width(self) -> int:
        """Width of all query heads together; n_embd without `head_dim`."""
        return self.n_heads * self.head_width

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with None resolved."""
        return self.n_kv_heads or self.n_heads

    @property
    def ffn_width(self) -> int:
        """Width of the SwiGLU hidden layer; without `ffn_hidden` by the rule in Meta's code."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        hidden = int(self.ffn_multiplier * int(8 * self.n_embd / 3))
        return self.multiple_of * math.ceil(hidden / self.multiple_of)


@dataclass(frozen=True)
class DataSource:
    """A data folder of a mixture: `[[data.sources]]` in a recipe."""

    path: str = ""
    """Folder written by `fastllama prepare`."""
    name: str = ""
    """Name in the logs; empty takes the name of the folder."""
    weight: float = 1.0
    """Share of the tokens, relative to the weights of the other sources."""
    max_epochs: float = 0.0
    """Refuse a run that reads this source more often; 0 sets no limit."""


@dataclass(frozen=True)
class ValidationSet:
    """Held-out text with columns of its own in the logs: `[[data.validation]]` in a recipe."""

    path: str = ""
    """Folder written by `fastllama prepare`."""
    name: str = ""
    """Name in the logs; empty takes the name of the folder."""
    split: Literal["validation", "train"] = "validation"
    """Split of the folder; train takes a folder that was prepared for validation only."""


@dataclass(frozen=True)
class Stage:
    """What changes from a number of tokens on: `[[data.stages]]` in a recipe.

    An option that is left out stays as it was before the stage.
    """

    start_tokens: int = 0
    """Tokens after which the stage begins, at the next whole update."""
    max_seq_len: int | None = None
    """Tokens in a training sequence."""
    batch_size: int | None = None
    """Sequences in one micro-batch of one device."""
    theta: float | None = None
    """Base of the rotary frequencies."""
    weights: tuple[float, ...] = ()
    """Weight of each of `data.sources`, in their order."""


@dataclass(frozen=True)
class DataConfig:
    """Token shards to train on."""

    path: str = ""
    """Folder written by `fastllama prepare`, or its URL; several are [[data.sources]]."""
    tokenizer: str = ""
    """A tokenizer.json that the data must have been prepared with; empty accepts any."""
    prefetch: int = 4
    """Micro-batches to read ahead."""
    cache_dir: str = ""
    """Folder that keeps what is read of data behind URLs; empty takes ~/.cache/fastllama/data."""
    cache_gb: float = 20.0
    """Largest size of this folder in GB (10^9 bytes), of all processes that share it."""
    document_mask: bool = False
    """Keep the documents of a sequence apart: a token sees only its own document."""
    sources: tuple[DataSource, ...] = ()
    """Data folders to mix by weight, instead of `path`."""
    validation: tuple[ValidationSet, ...] = ()
    """Held-out sets; without any, the validation split of every folder."""
    stages: tuple[Stage, ...] = ()
    """Changes of sequence length, mixture, micro-batch and rotary base during the run."""

    @property
    def source_names(self) -> list[str]:
        """The names of `sources` in the logs."""
        return [_name(source.name, source.path) for source in self.sources]

    @property
    def validation_names(self) -> list[str]:
        """The names of the validation sets; none if the only one is the split of `path`."""
        return [_name(held_out.name, held_out.path) for held_out in self.validation] or (
            self.source_names
        )


def _name(name: str, path: str) -> str:
    return name or os.path.basename(path.rstrip("/"))


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

    # The start.
    init_from: str = ""
    """Run, checkpoint or Hugging Face folder whose weights a new run starts from; or empty."""
    init_moments: bool = False
    """Also take the moments of AdamW from `init_from`."""

    # The loss.
    z_loss: float = 0.0
    """Weight of the mean squared log-normalizer in the training loss; PaLM uses 1e-4."""
    label_smoothing: float = 0.0
    """Probability that the training targets spread evenly over the vocabulary."""

    # Validation.
    eval_interval: int = 250
    """Updates between validations; 0 never validates."""
    eval_tokens: int = 2**20
    """Tokens of one validation, at most the whole held-out split."""

    # Computation.
    dtype: Literal["auto", "bfloat16", "float32"] = "bfloat16"
    """Compute type; parameters, moments and reductions are float32. auto takes bfloat16, except
    on a CPU that is not faster in it."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA if there is a GPU."""
    compile: Literal["auto", True, False] = True
    """torch.compile the model; auto does, except on a CPU without a C++ compiler."""
    compile_scope: Literal["block", "model"] = "block"
    """Compile the blocks, which share two graphs, or the whole model. block also compiles final
    norm and loss, unless they are Triton kernels."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a block saves: all; attention and matmuls except gate_up; or its inputs only."""
    save_projection_inputs: bool = False
    """Save the outputs of norms and of SwiGLU, which the backward of Triton kernels otherwise
    recomputes: 2 n_embd + ffn_hidden values more a token and layer, fewer bytes moved, the same
    bits."""
    kernels: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Operators of the model: Triton kernels, PyTorch for compiled training on a CPU, or plain
    PyTorch. auto takes triton on CUDA, cpu on a CPU if compiled, and reference if not."""
    attention: Literal[
        "auto",
        "flash-attn-3",
        "flash-attn-4",
        "flash-attn-2",
        "cudnn",
        "flash",
        "matmul",
        "reference",
    ] = "auto"
    """Attention backend. auto measures those of the GPU once and takes the fastest. On a CPU it
    takes matmul if compiled and the context is at most 1,024, and reference if not."""
    deterministic: bool = False
    """Compute the same bits in every run of this configuration; slower on CUDA."""

    # The average of the weights.
    ema_decay: float = 0.0
    """Keep an exponential average of the weights, of which an update keeps this share; 0 is off."""

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
    accumulate: Literal["auto", "unsharded", "sharded"] = "auto"
    """Sum gradients of micro-batches whole, or as shards to save memory; auto asks the plan."""
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
    upload: str = ""
    """URL of a folder for copies, such as s3://bucket/runs; or empty. A run folder without
    checkpoints resumes from the newest copy in URL/NAME, NAME being the name of the run folder."""


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
    def longest_seq_len(self) -> int:
        """Tokens in the longest training sequence of all stages."""
        return max(config.model.max_seq_len for config in self.stages)

    @property
    def positions_per_update(self) -> int:
        """Positions of the data order in one update; each is a longest sequence."""
        return self.training.tokens_per_update // self.longest_seq_len

    @property
    def is_mixture(self) -> bool:
        """Whether the run has several sources."""
        return len(self.data.sources) > 1

    @property
    def weights(self) -> list[tuple[int, tuple[float, ...]]]:
        """Weights of the sources by the position from which they hold."""
        base = tuple(source.weight for source in self.data.sources) or (1.0,)
        return [(0, base)] + [
            (self.first_position(stage), stage.weights)
            for stage in self.data.stages
            if stage.weights
        ]

    def first_position(self, stage: Stage) -> int:
        """The position at which a stage begins in a run that never rewinds."""
        return (self.first_step(stage) - 1) * self.positions_per_update

    def first_step(self, stage: Stage) -> int:
        """The first update of a stage, counted from 1."""
        return math.ceil(stage.start_tokens / self.training.tokens_per_update) + 1

    @property
    def stages(self) -> "list[Config]":
        """What each stage trains with; the first is the beginning of the run."""
        return [self, *(self.at(self.first_step(stage)) for stage in self.data.stages)]

    def at(self, step: int) -> "Config":
        """The configuration that update number `step`, from 1, trains with: stages applied."""
        config = self
        for stage in self.data.stages:
            if self.first_step(stage) <= step:
                config = config._changed_by(stage)
        return config

    def last_step(self, step: int) -> int:
        """The last update of the stage that update number `step` belongs to."""
        later = (self.first_step(stage) - 1 for stage in self.data.stages)
        return min([last for last in later if last >= step] + [self.n_updates])

    def _changed_by(self, stage: Stage) -> "Config":
        model = dataclasses.replace(
            self.model,
            max_seq_len=stage.max_seq_len or self.model.max_seq_len,
            theta=stage.theta or self.model.theta,
        )
        training = dataclasses.replace(
            self.training, batch_size=stage.batch_size or self.training.batch_size
        )
        return dataclasses.replace(self, model=model, training=training)

    @property
    def sequences_per_update(self) -> int:
        """Sequences in one optimizer update over all devices."""
        return self.training.tokens_per_update // self.model.max_seq_len

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches each of `world_size` devices accumulates into one update."""
        return self.sequences_per_update // (self.training.batch_size * world_size)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The groups as TOML can hold them; a field that is None is left out."""
        groups: dict[str, dict[str, Any]] = _without_none(dataclasses.asdict(self))
        return groups


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, tuple):
        return [_without_none(item) for item in value]
    return value
