"""Chooses the attention backend: the fastest supported one, measured once and cached on disk."""

import difflib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllama_kernels.attention import attention_reference
from fastllama_kernels.attention_backends import (
    BACKENDS,
    MISSING,
    Attention,
    AttentionShape,
    Backend,
    backends_for,
    first_line,
    set_flash_implementation,
)

__all__ = ["AttentionChoice", "AttentionShape", "attention_operator", "choose_attention"]

WARM_UPS, MEASUREMENTS = 3, 11
HEAD_START_CYCLES = 100_000_000
"""Clock cycles of the device, at least 50 ms. The host launches everything in less than 20 ms."""
CHECKED_TOKENS = 256
CHECKED_DOCUMENTS = 20
PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4")


@dataclass(frozen=True)
class AttentionChoice:
    """The chosen backend."""

    name: str
    reason: str
    """Why it was chosen, as a clause that follows the name in the log."""


def choose_attention(
    shape: AttentionShape, wanted: str = "auto", cache_folder: Path | None = None
) -> AttentionChoice:
    """Choose the attention backend of a training run; one rank chooses for all.

    "auto" checks and times a forward and backward of every supported backend. It takes
    "reference" if no other backend passes. The result is cached in `cache_folder`/attention.json.
    Under `torch.use_deterministic_algorithms` "auto" takes the first backend that passes its
    check: times differ between runs, and the chosen backend and the bits would differ with them.

    Args:
        shape: the attention call of one micro-batch; a CUDA device must be the current device.
        wanted: "auto" or the name of a backend.
        cache_folder: None means `fastllama` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ValueError: `wanted` is no backend, or the backend cannot run `shape` on this machine.
    """
    if wanted != "auto":
        _check(_find_backend(wanted), shape)
        return AttentionChoice(wanted, "as asked for")
    unsupported, candidates = {}, []
    for backend in backends_for(shape.device):
        unsupported_reason = backend.unsupported_reason(shape)
        if unsupported_reason is None:
            candidates.append(backend)
        else:
            unsupported[backend.name] = unsupported_reason
    if len(candidates) == 1:
        return AttentionChoice(
            candidates[0].name, "the only one that can" + _format_reasons(unsupported)
        )
    if torch.are_deterministic_algorithms_enabled():
        return _first_deterministic(shape, candidates, unsupported)
    file = (cache_folder or _default_folder()) / "attention.json"
    return _fastest_cached(shape, candidates, unsupported, file)


def attention_operator(name: str) -> Attention:
    """Load the backend `name` into this process and return its operator.

    Raises:
        ValueError: there is no such backend, or it cannot be loaded.
    """
    backend = _find_backend(name)
    try:
        return backend.load()
    except Exception as error:  # A third-party package may raise anything.
        raise ValueError(
            f"The attention {name} cannot be loaded by this process ({first_line(error)}); "
            "install the same packages on every machine, or choose another attention."
        ) from error


def _find_backend(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    names = [backend.name for backend in BACKENDS]
    nearest = difflib.get_close_matches(name.lower(), names, n=1)
    guess = f"; did you mean {nearest[0]}?" if nearest else "."
    raise ValueError(f"There is no attention {name!r}{guess} Choose auto, {', '.join(names)}.")


def _check(backend: Backend, shape: AttentionShape) -> None:
    unsupported_reason = backend.unsupported_reason(shape)
    if unsupported_reason is None and backend is not BACKENDS[-1]:
        _, failures = _measure(shape, [backend])
        unsupported_reason = failures.get(backend.name)
    if unsupported_reason is not None:
        raise ValueError(
            f"The attention {backend.name} was asked for, but {unsupported_reason}; use auto, "
            "which takes the fastest that can run."
        )


def _default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache:
        return Path(cache, "fastllama")
    try:
        return Path.home() / ".cache" / "fastllama"
    except RuntimeError:  # The user has no home, as in some containers.
        return Path(tempfile.gettempdir(), "fastllama")


def _format_reasons(rejected: dict[str, str]) -> str:
    """Format reasons by backend name as " (a, b: one reason; c: another)".

    Of packages that are missing it says so. Asking for such a backend tells how to install it.
    """
    short = {
        name: "not installed" if MISSING in reason else reason for name, reason in rejected.items()
    }
    clauses = []
    for reason in dict.fromkeys(short.values()):
        names = ", ".join(name for name, other in short.items() if other == reason)
        clauses.append(f"{names}: {reason}")
    return f" ({'; '.join(clauses)})" if clauses else ""


def _first_deterministic(
    shape: AttentionShape, candidates: Sequence[Backend], unsupported: dict[str, str]
) -> AttentionChoice:
    *fused, reference = candidates
    failures: dict[str, str] = {}
    for backend in fused:
        seconds, failure = _measure(shape, [backend])
        if backend.name in seconds:
            reason = "the first that is deterministic" + _format_reasons(failures | unsupported)
            return AttentionChoice(backend.name, reason)
        failures |= failure
    rejected = _format_reasons(failures | unsupported)
    return AttentionChoice(reference.name, "the only one that passes its test" + rejected)


def _fastest_cached(
    shape: AttentionShape, candidates: Sequence[Backend], unsupported: dict[str, str], file: Path
) -> AttentionChoice:
    key = _key(shape, candidates)
    match _read(file).get(key):
        case {"name": str(name), "reason": str(reason)} if name in {x.name for x in candidates}:
            return AttentionChoice(name, f"{reason}, from the cache in {file}")
    *fused, reference = candidates
    seconds, failures = _measure(shape, fused)
    rejected = _format_reasons(failures | unsupported)
    ranking = [*sorted(seconds, key=lambda name: seconds[name]), reference.name]
    if len(seconds) < 2:
        return AttentionChoice(ranking[0], "the only one that passes its test" + rejected)
    first, second = ranking[:2]
    ratio = seconds[second] / seconds[first]
    choice = AttentionChoice(first, f"{ratio:.2f}x as fast as {second}, measured{rejected}")
    # A failure may be temporary, such as running out of memory.
    if not failures:
        try:
            _write(file, _read(file) | {key: asdict(choice)})
        except OSError as error:
            return replace(choice, reason=f"{choice.reason}, not cached: {error}")
    return choice


def _key(shape: AttentionShape, candidates: Sequence[Backend]) -> str:
    """The cache key: everything a measurement depends on, readable."""
    device = shape.device.type
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability(shape.device)
        device = f"{torch.cuda.get_device_name(shape.device)} sm_{major}{minor}"
    sizes = {
        name: str(size)
        for name, size in vars(shape).items()
        if name != "device" and size is not None
    }
    parts = [device, f"torch {torch.__version__}", f"cudnn {torch.backends.cudnn.version()}"]
    parts += [f"{package} {_version(package)}" for package in PACKAGES]
    parts += ["of " + " ".join(backend.name for backend in candidates)]
    parts += [f"{name} {size}" for name, size in sizes.items()]
    return ", ".join(parts)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _read(file: Path) -> dict[str, Any]:
    """The entries of the cache; empty if the file is missing, unreadable or malformed."""
    try:
        # A pipe would wait for a writer.
        entries = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write(file: Path, entries: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=file.name, dir=file.parent)
    try:
        with open(descriptor, "w") as stream:
            json.dump(entries, stream, indent=2)
        os.replace(temporary, file)
    except OSError:
        os.unlink(temporary)
        raise


def _measure(
    shape: AttentionShape, backends: Sequence[Backend]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return seconds of a forward and backward, and reasons of failures, by backend name."""
    seconds, failures = {}, {}
    try:
        for backend in backends:
            try:
                operator = backend.load()
                failure = _accuracy_failure(operator, shape) or _determinism_failure(
                    operator, shape
                )
                if failure is None:
                    seconds[backend.name] = _seconds(operator, shape)
                else:
                    failures[backend.name] = failure
            except Exception as error:  # A third-party kernel may raise anything.
                failures[backend.name] = f"it raises {first_line(error)}"
    finally:
        set_flash_implementation(None)
    return seconds, failures


def _accuracy_failure(operator: Attention, shape: AttentionShape) -> str | None:
    """Compare one short sequence with float32; describe the first gross error, if any."""
    small = replace(
        shape,
        batch_size=1,
        seq_len=min(shape.seq_len, CHECKED_TOKENS),
        n_documents=None if shape.n_documents is None else CHECKED_DOCUMENTS,
    )
    *inputs, upstream = _random_inputs(small)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    options = _options(small)
    results = _forward_backward(operator, inputs, upstream, options)
    truths = _forward_backward(attention_reference, exact, upstream.float(), options)
    # Rounding costs a few eps; a wrong mask, scale or head costs as much as the value.
    tolerance = 16 * torch.finfo(shape.dtype).eps
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, result, truth in zip(names, results, truths, strict=True):
        error = (result.float() - truth).abs().max().item()
        largest = truth.abs().max().item()
        # Written so that NaN fails.
        if not error <= tolerance * largest:
            return f"its {name} is off by {error:.2g} of {largest:.2g}"
    return None


def _determinism_failure(operator: Attention, shape: AttentionShape) -> str | None:
    """In deterministic mode, compare the bits of several runs: not every package obeys the mode."""
    if not torch.are_deterministic_algorithms_enabled():
        return None
    *inputs, upstream = _random_inputs(shape)
    options = _options(shape)
    first = _forward_backward(operator, inputs, upstream, options)
    for _ in range(WARM_UPS):
        again = _forward_backward(operator, inputs, upstream, options)
        if not all(torch.equal(x, y) for x, y in zip(first, again, strict=True)):
            return "its results differ from run to run"
    return None


def _random_inputs(shape: AttentionShape) -> list[Tensor]:
    """Return q, k, v as views of one packed projection, as in the model, and the upstream."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def randn(n_heads: int) -> Tensor:
        size = (shape.batch_size, shape.seq_len, n_heads, shape.head_dim)
        return torch.randn(size, generator=generator, dtype=shape.dtype, device=shape.device)

    heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    qkv = randn(sum(heads)).split(heads, dim=2)
    return [*(x.detach().requires_grad_() for x in qkv), randn(shape.n_heads)]


def _options(shape: AttentionShape) -> dict[str, Tensor]:
    """Return the keyword arguments of a call: `cu_seqlens`, if documents are kept apart.

    A quarter of the documents are of equal length, and the rest of length 0, as in training.
    """
    if shape.n_documents is None:
        return {}
    n_tokens = shape.batch_size * shape.seq_len
    per_sequence = max(1, shape.n_documents // 4 // shape.batch_size)
    starts = [
        sequence * shape.seq_len + document * shape.seq_len // per_sequence
        for sequence in range(shape.batch_size)
        for document in range(per_sequence)
    ]
    starts += [n_tokens] * (shape.n_documents + 1 - len(starts))
    return {"cu_seqlens": torch.tensor(starts, dtype=torch.int32, device=shape.device)}


def _forward_backward(
    operator: Attention, inputs: Sequence[Tensor], upstream: Tensor, options: dict[str, Tensor]
) -> list[Tensor]:
    out = operator(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def _seconds(operator: Attention, shape: AttentionShape) -> float:
    """Median seconds of a forward and backward."""
    *inputs, upstream = _random_inputs(shape)
    options = _options(shape)

    def run() -> None:
        _forward_backward(operator, inputs, upstream, options)

    for _ in range(WARM_UPS):
        run()
    times = _times_on_cuda if shape.device.type == "cuda" else _times_on_host
    return statistics.median(times(run))


def _times_on_cuda(run: Callable[[], None]) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(MEASUREMENTS + 1)]
    # The device is busy until everything is launched: a kernel may be shorter than its launch. In a
    # training step the host runs ahead too.
    torch.cuda._sleep(HEAD_START_CYCLES)
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


def _times_on_host(run: Callable[[], None]) -> list[float]:
    timestamps = [time.perf_counter()]
    for _ in range(MEASUREMENTS):
        run()
        timestamps.append(time.perf_counter())
    return [end - start for start, end in pairwise(timestamps)]
