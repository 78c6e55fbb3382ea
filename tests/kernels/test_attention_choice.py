import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.nn.attention import _registry, current_flash_attention_impl

from fastllama_kernels import attention, attention_choice
from fastllama_kernels.attention import attention_reference
from fastllama_kernels.attention_backends import (
    Attention,
    Backend,
    set_flash_implementation,
)
from fastllama_kernels.attention_choice import (
    AttentionChoice,
    AttentionShape,
    attention_operator,
    choose_attention,
)

SHAPE = AttentionShape(
    batch_size=2,
    seq_len=33,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
)


def correct(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention_reference(q, k, v, **options)


def fake(
    name: str, operator: Attention = correct, unsupported_reason: str | None = None
) -> Backend:
    # Each backend has its own function, so that tests can tell them apart.
    return Backend(
        name, lambda shape: unsupported_reason, lambda: lambda *x, **y: operator(*x, **y)
    )


REFERENCE = Backend("reference", lambda shape: None, lambda: attention)
SetBackends = Callable[..., None]
SetTimes = Callable[..., None]


@pytest.fixture
def set_backends(monkeypatch: pytest.MonkeyPatch) -> SetBackends:
    """Replaces all backends but the reference."""

    def set_backends(*backends: Backend) -> None:
        everything = (*backends, REFERENCE)
        monkeypatch.setattr(attention_choice, "BACKENDS", everything)
        monkeypatch.setattr(attention_choice, "backends_for", lambda device: everything)

    return set_backends


@pytest.fixture
def forbid_measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def fail(*arguments: Any) -> NoReturn:
        raise AssertionError("a backend was measured")

    return lambda: monkeypatch.setattr(attention_choice, "_measure", fail)


@pytest.fixture
def set_times(monkeypatch: pytest.MonkeyPatch) -> SetTimes:
    """Sets the measured seconds, in the order of the measurements."""

    def set_times(*seconds: float) -> None:
        times = iter(seconds)
        monkeypatch.setattr(attention_choice, "_seconds", lambda *arguments: next(times))

    return set_times


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(0.02)
        return gradient


def slow_forward(*inputs: Tensor) -> Tensor:
    time.sleep(0.02)
    return correct(*inputs)


def slow_backward(*inputs: Tensor) -> Tensor:
    out: Tensor = SlowBackward.apply(correct(*inputs))
    return out


class OtherBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.2


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return correct(q, k, OtherBackward.apply(v))


def wrong_mask(*inputs: Tensor) -> Tensor:
    return correct(*inputs, causal=False)


def wrong_packing(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    return correct(q, k, v)


def wrong_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return correct(q * 1.5, k, v)


def wrong_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return correct(q, k.flip(2), v)


def nan_somewhere(*inputs: Tensor) -> Tensor:
    return correct(*inputs).index_fill(1, torch.tensor([7]), float("nan"))


def out_of_memory(*inputs: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def test_cpu_gets_the_reference_unmeasured(
    forbid_measuring: Callable[[], None], tmp_path: Path
) -> None:
    forbid_measuring()
    for dtype in (torch.float32, torch.bfloat16):
        choice = choose_attention(replace(SHAPE, dtype=dtype), cache_folder=tmp_path)
        assert choice == AttentionChoice(
            "reference",
            "the only one that can (flash-attn-3, flash-attn-4, flash-attn-2, cudnn, flash: "
            "it needs a CUDA device, not cpu)",
        )
    assert list(tmp_path.iterdir()) == []


def test_single_candidate(set_backends: SetBackends, tmp_path: Path) -> None:
    set_backends(
        fake("a", unsupported_reason="it is too old"),
        fake("b"),
        fake("c", unsupported_reason="it is too new"),
    )
    assert choose_attention(SHAPE, cache_folder=tmp_path) == AttentionChoice(
        "b", "the only one that passes its test (a: it is too old; c: it is too new)"
    )


def test_missing_packages_are_named_together(set_backends: SetBackends, tmp_path: Path) -> None:
    set_backends(
        fake("a", unsupported_reason="the package a is not installed (pip install a)"),
        fake("b"),
        fake("c", unsupported_reason="the package c is not installed (build it)"),
    )
    reason = choose_attention(SHAPE, cache_folder=tmp_path).reason
    assert reason == "the only one that passes its test (a, c: not installed)"
    # Whoever asks for one reads how to install it.
    with pytest.raises(ValueError, match=r"pip install a"):
        choose_attention(SHAPE, "a")


@pytest.mark.parametrize("slow", [slow_forward, slow_backward])
def test_faster_backend_wins(slow: Attention, set_backends: SetBackends, tmp_path: Path) -> None:
    set_backends(fake("slow", slow), fake("fast"))
    choice = choose_attention(SHAPE, cache_folder=tmp_path)
    assert choice.name == "fast"
    assert "x as fast as slow, measured" in choice.reason


def test_reason_compares_with_the_second_fastest(
    set_backends: SetBackends, set_times: SetTimes, tmp_path: Path
) -> None:
    set_backends(fake("a"), fake("b", unsupported_reason="it is too old"), fake("c"), fake("d"))
    set_times(0.131, 0.3, 0.1)
    assert choose_attention(SHAPE, cache_folder=tmp_path) == AttentionChoice(
        "d", "1.31x as fast as a, measured (b: it is too old)"
    )


def test_tie_goes_to_the_first(
    set_backends: SetBackends, set_times: SetTimes, tmp_path: Path
) -> None:
    set_backends(fake("b"), fake("a"))
    set_times(0.1, 0.1)
    assert choose_attention(SHAPE, cache_folder=tmp_path).name == "b"


@pytest.mark.parametrize(
    ("operator", "clause"),
    [
        (wrong_mask, "its output is off by"),
        (wrong_scale, "its output is off by"),
        (wrong_heads, "its output is off by"),
        (wrong_gradient, "its gradient of v is off by "),
        (nan_somewhere, "its output is off by nan"),
        (out_of_memory, "it raises OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_failed_backend_is_skipped_and_nothing_is_cached(
    operator: Attention,
    clause: str,
    set_backends: SetBackends,
    set_times: SetTimes,
    tmp_path: Path,
) -> None:
    set_backends(fake("broken", operator), fake("a"), fake("b"))
    set_times(0.2, 0.1)
    choice = choose_attention(SHAPE, cache_folder=tmp_path)
    assert choice.name == "b"
    assert f"measured (broken: {clause}" in choice.reason
    assert "\n" not in choice.reason
    assert list(tmp_path.iterdir()) == []


def test_unloadable_backend_is_skipped(
    set_backends: SetBackends, set_times: SetTimes, tmp_path: Path
) -> None:
    def load() -> NoReturn:
        raise RuntimeError("Module 'x' does not expose FA3 kernels")

    set_backends(Backend("broken", lambda shape: None, load), fake("a"))
    set_times(0.2)
    assert choose_attention(SHAPE, cache_folder=tmp_path) == AttentionChoice(
        "a",
        "the only one that passes its test (broken: it raises RuntimeError: Module 'x' does not "
        "expose FA3 kernels)",
    )


def test_reference_if_all_fail(set_backends: SetBackends, tmp_path: Path) -> None:
    set_backends(
        fake("a", wrong_mask),
        fake("b", out_of_memory),
        fake("c", unsupported_reason="it is too old"),
    )
    choice = choose_attention(SHAPE, cache_folder=tmp_path)
    assert choice.name == "reference"
    assert choice.reason.startswith("the only one that passes its test (a: its output is off by")
    assert choice.reason.endswith("c: it is too old)")


@pytest.mark.parametrize(
    ("seq_len", "n_documents"), [(2, None), (33, None), (33, 4), (1000, None), (1000, 64)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_correct_results_pass(dtype: torch.dtype, seq_len: int, n_documents: int | None) -> None:
    shape = replace(SHAPE, dtype=dtype, seq_len=seq_len, n_documents=n_documents)
    assert attention_choice._accuracy_failure(correct, shape) is None


def test_checks_a_short_sequence_and_times_the_full_shape() -> None:
    calls = []

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((q.shape, k.shape, v.shape, q.dtype))
        # Views of one buffer, as in the model.
        assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        return correct(q, k, v)

    shape = replace(SHAPE, seq_len=300)
    attention_choice._accuracy_failure(record, shape)
    attention_choice._seconds(record, shape)
    short, *timed = calls
    assert short == ((1, 256, 4, 16), (1, 256, 2, 16), (1, 256, 2, 16), torch.bfloat16)
    assert len(timed) == attention_choice.WARM_UPS + attention_choice.MEASUREMENTS
    assert set(timed) == {((2, 300, 4, 16), (2, 300, 2, 16), (2, 300, 2, 16), torch.bfloat16)}


def test_backend_that_mixes_documents_is_skipped(
    set_backends: SetBackends, set_times: SetTimes, tmp_path: Path
) -> None:
    set_backends(fake("mixing", wrong_packing), fake("a"))
    set_times(0.1, 0.2, 0.2)
    assert choose_attention(SHAPE, cache_folder=tmp_path).name == "mixing"
    choice = choose_attention(replace(SHAPE, n_documents=16), cache_folder=tmp_path)
    assert choice.name == "a"
    assert "mixing: its output is off by" in choice.reason


def test_times_packed_documents_of_fixed_length() -> None:
    starts = []

    def record(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        starts.append(cu_seqlens.tolist())
        return correct(q, k, v, cu_seqlens=cu_seqlens)

    attention_choice._seconds(record, replace(SHAPE, seq_len=300, n_documents=16))
    assert starts[0] == [0, 150, 300, 450, *[600] * 13]
    attention_choice._seconds(record, replace(SHAPE, n_documents=2))
    assert starts[-1] == [0, 33, 66]


def test_choice_is_cached(
    set_backends: SetBackends,
    set_times: SetTimes,
    forbid_measuring: Callable[[], None],
    tmp_path: Path,
) -> None:
    set_backends(fake("a"), fake("b"))
    set_times(0.2, 0.1)
    folder = tmp_path / "not" / "there"
    first = choose_attention(SHAPE, cache_folder=folder)
    forbid_measuring()
    again = choose_attention(SHAPE, cache_folder=folder)
    assert again.name == first.name == "b"
    assert again.reason == f"{first.reason}, from the cache in {folder / 'attention.json'}"
    assert [path.name for path in folder.iterdir()] == ["attention.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 3},
        {"seq_len": 34},
        {"n_heads": 2},
        {"n_kv_heads": 4},
        {"head_dim": 24},
        {"dtype": torch.float16},
        {"n_documents": 16},
    ],
)
def test_each_shape_is_cached(
    change: dict[str, Any], set_backends: SetBackends, set_times: SetTimes, tmp_path: Path
) -> None:
    set_backends(fake("a"), fake("b"))
    set_times(0.2, 0.1, 0.1, 0.2)
    assert choose_attention(SHAPE, cache_folder=tmp_path).name == "b"
    assert choose_attention(replace(SHAPE, **change), cache_folder=tmp_path).name == "a"
    for shape, name in ((SHAPE, "b"), (replace(SHAPE, **change), "a")):
        choice = choose_attention(shape, cache_folder=tmp_path)
        assert choice.name == name
        assert "from the cache" in choice.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(torch, "__version__", "2.99.0"),
        lambda patch: patch.setattr(torch.backends.cudnn, "version", lambda: 99),
        lambda patch: patch.setattr(attention_choice, "_version", lambda package: "9"),
        lambda patch: patch.setattr(attention_choice, "PACKAGES", ("torch",)),
    ],
)
def test_other_software_is_measured_again(
    change: Callable[[pytest.MonkeyPatch], None],
    set_backends: SetBackends,
    set_times: SetTimes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    set_backends(fake("a"), fake("b"))
    set_times(0.2, 0.1, 0.1, 0.2)
    assert choose_attention(SHAPE, cache_folder=tmp_path).name == "b"
    change(monkeypatch)
    assert choose_attention(SHAPE, cache_folder=tmp_path).name == "a"


def test_other_candidates_are_measured_again(
    set_backends: SetBackends, set_times: SetTimes, tmp_path: Path
) -> None:
    set_times(0.2, 0.1, 0.2, 0.1, 0.05)
    set_backends(fake("a"), fake("b"))
    assert choose_attention(SHAPE, cache_folder=tmp_path).name == "b"
    set_backends(fake("a"), fake("b"), fake("c"))
    assert choose_attention(SHAPE, cache_folder=tmp_path).name == "c"


def test_key_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    keys = [
        attention_choice._key(replace(SHAPE, device=torch.device(device)), [REFERENCE])
        for device in ("cuda:0", "cuda:5")
    ]
    assert keys[0] == keys[1]
    assert keys[0].startswith(f"NVIDIA H200 sm_90, torch {torch.__version__}, cudnn ")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b"[" * 100_000,
        b'{"KEY": 3}',
        b'{"KEY": {"name": "b"}}',
        b'{"KEY": {"name": ["b"], "reason": "x"}}',
        b'{"KEY": {"name": "gone", "reason": "x"}}',
    ],
)
def test_malformed_cache_is_rewritten(
    content: bytes, set_backends: SetBackends, set_times: SetTimes, tmp_path: Path
) -> None:
    backends = (fake("a"), fake("b"))
    set_backends(*backends)
    set_times(0.2, 0.1)
    key = attention_choice._key(SHAPE, [*backends, REFERENCE])
    file = tmp_path / "attention.json"
    file.write_bytes(content.replace(b"KEY", key.encode()))
    choice = choose_attention(SHAPE, cache_folder=tmp_path)
    assert choice == AttentionChoice("b", "2.00x as fast as a, measured")
    assert json.loads(file.read_text()) == {key: {"name": "b", "reason": choice.reason}}


def test_cache_that_is_no_file(
    set_backends: SetBackends, set_times: SetTimes, tmp_path: Path
) -> None:
    set_backends(fake("a"), fake("b"))
    set_times(0.2, 0.1)
    os.mkfifo(tmp_path / "attention.json")
    assert choose_attention(SHAPE, cache_folder=tmp_path).name == "b"
    assert (tmp_path / "attention.json").is_file()


def test_other_entries_are_kept(
    set_backends: SetBackends, set_times: SetTimes, tmp_path: Path
) -> None:
    set_backends(fake("a"), fake("b"))
    set_times(0.2, 0.1)
    file = tmp_path / "attention.json"
    file.write_text('{"another machine": {"name": "x", "reason": "y"}}')
    choose_attention(SHAPE, cache_folder=tmp_path)
    entries = json.loads(file.read_text())
    assert len(entries) == 2
    assert entries["another machine"] == {"name": "x", "reason": "y"}


def test_unwritable_folder_is_not_an_error(
    set_backends: SetBackends, set_times: SetTimes, tmp_path: Path
) -> None:
    set_backends(fake("a"), fake("b"))
    set_times(0.2, 0.1)
    (tmp_path / "file").touch()
    choice = choose_attention(SHAPE, cache_folder=tmp_path / "file")
    assert choice.name == "b"
    assert choice.reason.startswith("2.00x as fast as a, measured, not cached: [Errno ")


def test_failed_write_keeps_the_old_cache(
    set_backends: SetBackends,
    set_times: SetTimes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*arguments: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    set_backends(fake("a"), fake("b"))
    set_times(0.2, 0.1)
    (tmp_path / "attention.json").write_text("{}")
    monkeypatch.setattr(os, "replace", fail)
    choice = choose_attention(SHAPE, cache_folder=tmp_path)
    assert choice.reason.endswith("not cached: [Errno 28] No space left on device")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}"]


@pytest.mark.parametrize(
    ("variable", "folder"), [("XDG_CACHE_HOME", "fastllama"), ("HOME", ".cache/fastllama")]
)
def test_default_folder(
    variable: str,
    folder: str,
    set_backends: SetBackends,
    set_times: SetTimes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    set_backends(fake("a"), fake("b"))
    set_times(0.2, 0.1)
    choose_attention(SHAPE)
    assert (tmp_path / folder / "attention.json").exists()


def test_default_folder_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def home() -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert attention_choice._default_folder() == tmp_path / "fastllama"


def test_named_backend(set_backends: SetBackends, tmp_path: Path) -> None:
    set_backends(fake("a"), fake("b"))
    for name in ("a", "b", "reference"):
        assert choose_attention(SHAPE, name, tmp_path) == AttentionChoice(name, "as asked for")
    assert list(tmp_path.iterdir()) == []


def test_named_reference_is_not_checked(forbid_measuring: Callable[[], None]) -> None:
    forbid_measuring()
    assert choose_attention(SHAPE, "reference").name == "reference"


@pytest.mark.parametrize(
    ("operator", "clause"),
    [(wrong_mask, "its output is off by"), (out_of_memory, "it raises OutOfMemoryError: CUDA")],
)
def test_named_backend_that_fails_raises(
    operator: Attention, clause: str, set_backends: SetBackends
) -> None:
    set_backends(fake("broken", operator), fake("a"))
    with pytest.raises(ValueError, match=f"The attention broken was asked for, but {clause}"):
        choose_attention(SHAPE, "broken")


def test_named_unsupported_backend_raises() -> None:
    with pytest.raises(ValueError, match="cudnn was asked for") as caught:
        choose_attention(SHAPE, "cudnn")
    assert str(caught.value) == (
        "The attention cudnn was asked for, but it needs a CUDA device, not cpu; use auto, which "
        "takes the fastest that can run."
    )


def test_named_backend_without_its_package_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    shape = replace(SHAPE, device=torch.device("cuda"))
    with pytest.raises(ValueError, match="was asked for, but the package flash_attn is not inst"):
        choose_attention(shape, "flash-attn-2")


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("flash-attn", "; did you mean flash-attn-4? "),
        ("cuDNN", "; did you mean cudnn? "),
        ("xformers", ". "),
        ("", ". "),
    ],
)
def test_unknown_name_raises(name: str, guess: str) -> None:
    message = (
        f"There is no attention {name!r}{guess}Choose auto, flash-attn-3, flash-attn-4, "
        "flash-attn-2, cudnn, flash, matmul, reference."
    )
    for choose in (lambda: choose_attention(SHAPE, name), lambda: attention_operator(name)):
        with pytest.raises(ValueError, match="There is no attention") as caught:
            choose()
        assert str(caught.value) == message


def test_attention_operator(set_backends: SetBackends) -> None:
    assert attention_operator("reference") is attention
    set_backends(fake("a", lambda *x: torch.tensor(1.0)), fake("b", lambda *x: torch.tensor(2.0)))
    assert attention_operator("b")().item() == 2.0


def test_attention_operator_that_cannot_be_loaded_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    message = "flash-attn-3 cannot be loaded by this process .ModuleNotFoundError: .*_interface"
    with pytest.raises(ValueError, match=message):
        attention_operator("flash-attn-3")


def test_process_state_is_restored(
    set_backends: SetBackends, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Handle:
        def remove(self) -> None:
            pass

    def load(name: str) -> Callable[[], Attention]:
        def load() -> Attention:
            set_flash_implementation(name)
            return out_of_memory if name == "FA4" else correct

        return load

    for name in ("FA3", "FA4"):
        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, name, Handle)
    set_backends(*(Backend(name, lambda shape: None, load(name)) for name in ("FA3", "FA4")))
    before = torch.get_rng_state()
    assert choose_attention(SHAPE, cache_folder=tmp_path).name == "FA3"
    assert current_flash_attention_impl() is None
    assert torch.equal(torch.get_rng_state(), before)


def test_time_is_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "_times_on_host", lambda run: [2.0, 1.0, 30.0])
    assert attention_choice._seconds(correct, SHAPE) == 2.0


def test_gpu_times_come_from_events(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.moment = len(done) ** 2

        def synchronize(self) -> None:
            done.append("synchronized")

        def elapsed_time(self, end: "Event") -> float:
            assert done[-1] == "synchronized"
            return float(end.moment - self.moment)

    slept: list[int] = []

    def sleep(cycles: int) -> None:
        assert not done
        slept.append(cycles)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(attention_choice, "MEASUREMENTS", 3)
    times = attention_choice._times_on_cuda(lambda: done.append("ran"))
    # The events are at 0, 1, 4 and 9 ms.
    assert times == pytest.approx([0.001, 0.003, 0.005])
    # The device waits for the host before the first event, and not between the runs.
    assert slept == [attention_choice.HEAD_START_CYCLES]


@pytest.mark.gpu
def test_choice_on_a_gpu(tmp_path: Path) -> None:
    shape = replace(SHAPE, seq_len=512, n_heads=8, head_dim=64, device=torch.device("cuda"))
    choice = choose_attention(shape, cache_folder=tmp_path)
    assert "it raises" not in choice.reason
    assert "is off by" not in choice.reason
    operator = attention_operator(choice.name)
    try:
        assert attention_choice._accuracy_failure(operator, shape) is None
    finally:
        set_flash_implementation(None)


def test_deterministic_mode_takes_the_first_that_passes(
    set_backends: SetBackends, set_times: SetTimes, deterministic_mode: None, tmp_path: Path
) -> None:
    set_backends(fake("broken", out_of_memory), fake("a"), fake("b"))
    set_times(2.0, 1.0)
    choice = choose_attention(SHAPE, cache_folder=tmp_path)
    assert choice.name == "a"
    assert choice.reason.startswith("the first that is deterministic (broken: it raises ")
    assert not list(tmp_path.iterdir())
    set_backends(fake("broken", out_of_memory), fake("worse", wrong_mask))
    assert choose_attention(SHAPE, cache_folder=tmp_path).name == "reference"


def test_deterministic_mode_rejects_results_that_vary(
    set_backends: SetBackends, deterministic_mode: None, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)

    def varying(*inputs: Tensor) -> Tensor:
        out = correct(*inputs)
        return out * (1 + 1e-2 * torch.rand(out.shape, generator=draw)).to(out.dtype)

    set_backends(fake("varying", varying), fake("a"))
    choice = choose_attention(SHAPE, cache_folder=tmp_path)
    assert choice.name == "a"
    assert "varying: its results differ from run to run" in choice.reason
    with pytest.raises(ValueError, match="varying was asked for, but its results differ"):
        choose_attention(SHAPE, "varying")
    torch.use_deterministic_algorithms(False)
    assert choose_attention(SHAPE, "varying").name == "varying"
