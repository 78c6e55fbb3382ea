"""torch.compile: which modules it compiles, and reports of graphs compiled late."""

import dataclasses
import io
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import cpu_vec_isa
from torch._inductor.utils import fresh_cache

from fastllama.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from fastllama.distributed import compilation
from fastllama.distributed.compilation import FIRST_UPDATE_MINUTES, CompileWatch, compile_model
from fastllama.distributed.world import World, distributed
from fastllama.errors import SideJobFailedError
from fastllama.model.llama import Llama
from fastllama.training.setup import build_state
from fastllama_kernels import CPU, REFERENCE, TRITON, Operators
from tests.distributed.test_world import timeouts
from tests.runs import losses, train
from tests.sessions import fresh_start, resolved_session
from tests.workspace import Workspace

MODEL = ModelConfig(vocab_size=32, n_embd=16, n_layers=2, n_heads=2, multiple_of=16, max_seq_len=8)
CONFIG = Config(
    training=TrainingConfig(device="cpu", compile=True), parallel=ParallelConfig(timeout_minutes=3)
)


@pytest.fixture
def world() -> Iterator[World]:
    with distributed(CONFIG) as world:
        yield world


@pytest.mark.parametrize("operators", [REFERENCE, CPU, TRITON], ids=lambda each: each.name)
@pytest.mark.parametrize("scope", ["block", "model"])
def test_compile_scope(scope: str, operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    model = Llama(MODEL, operators)
    compile_model(model, Config(training=TrainingConfig(compile_scope=scope)))  # type: ignore[arg-type]
    # Kernels need no compiler.
    behind_blocks = [] if operators is TRITON else [model.norm, model.output]
    assert compiled == ([model] if scope == "model" else [*model.blocks, *behind_blocks])


@pytest.mark.parametrize("compiled", [False, True])
def test_vector_instructions_are_probed_beside_the_main_thread(
    compiled: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = queue.SimpleQueue[threading.Thread]()
    monkeypatch.setattr(
        cpu_vec_isa, "valid_vec_isa_list", lambda: probed.put(threading.current_thread())
    )
    config = dataclasses.replace(
        CONFIG, model=MODEL, training=dataclasses.replace(CONFIG.training, compile=compiled)
    )
    build_state(resolved_session(config, world), fresh_start(), CPU)
    if compiled:
        assert probed.get(timeout=60) is not threading.main_thread()
    assert probed.empty()


# PyTorch warns about its own code.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True])
def test_any_length_of_packed_documents_is_compiled(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Llama(MODEL, REFERENCE)
    model.init_weights(seed=0)
    for module in (*model.blocks, model.norm, model.output):
        monkeypatch.setattr(module, "compile", partial(module.compile, backend="eager"))
    tokens = torch.arange(16).view(2, 8)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_model(model, Config(data=DataConfig(document_mask=masked)))
        before = counters["stats"]["unique_graphs"]
        for length in (3, 9, 17):
            for second in (3, 8):
                model(tokens, cu_seqlens=torch.tensor([0, second, 8, *[16] * (length - 2)]))
        # Of the first block and of the other; other documents of one length share them. Of norm
        # and output.
        assert counters["stats"]["unique_graphs"] - before == (3 * 2 + 2 if masked else 3)
    torch._dynamo.reset()


# PyTorch warns about its own code.
@pytest.mark.slow  # Compiles a model.
@pytest.mark.filterwarnings("ignore")
def test_gradients_of_equal_tokens_are_added_in_a_fixed_order() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch._dynamo.reset()
        model = Llama(dataclasses.replace(MODEL, n_layers=1), REFERENCE)
        model.init_weights(seed=0)
        compile_model(model, Config(training=TrainingConfig(compile_scope="model")))
        # 8,192 gradients of token 0, enough that threads share them.
        tokens, targets = torch.zeros(2, 1024, 8, dtype=torch.int64)
        targets += torch.arange(8192).view(1024, 8) % 32
        found = set()
        for _ in range(20):
            model.zero_grad()
            model(tokens, targets).backward()
            assert model.embedding.weight.grad is not None
            found.add(tuple(model.embedding.weight.grad[0].tolist()))
        assert len(found) == 1
    finally:
        torch.set_num_threads(before)
        torch._dynamo.reset()


@pytest.mark.slow  # Compiles a model twice.
@pytest.mark.filterwarnings("ignore")
def test_a_second_start_takes_its_graphs_from_the_cache() -> None:
    tokens = torch.arange(16).view(2, 8)
    with fresh_cache():
        for expected in ("miss", "hit"):
            # As in a new process.
            torch._dynamo.reset()
            counters.clear()
            # Its loss is a torch.autograd.Function.
            model = Llama(dataclasses.replace(MODEL, n_layers=1), CPU)
            model.init_weights(seed=0)
            compile_model(model, Config(training=TrainingConfig(compile_scope="model")))
            model(tokens, tokens).backward()
            assert counters["aot_autograd"][f"autograd_cache_{expected}"] == 1
            assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
    torch._dynamo.reset()


def test_long_first_timeout_and_report_of_late_graphs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Counts at the start, where a warm-up makes one, and before and after updates 11, 12 and 13.
    graphs = iter([0, 1, 2, 5, 5, 5, 6])
    monkeypatch.setattr(compilation, "n_compiled_graphs", lambda: next(graphs))
    out = io.StringIO()
    watch = CompileWatch(CONFIG, world, Console(file=out, width=200), time.perf_counter() - 7)
    allowed = []
    for step in (11, 12, 13):
        with watch.update(step):
            allowed += [wait.total_seconds() / 60 for wait in timeouts(world)]
    assert allowed == [FIRST_UPDATE_MINUTES, 3, 3]
    first, second = out.getvalue().splitlines()
    assert first.startswith("first update done 7.")
    assert first.endswith("2 graphs compiled")
    # The 3 graphs of a validation between updates 11 and 12 are expected, and not reported.
    assert second.startswith("step 13: torch.compile made 1 more graphs")


def test_long_timeout_of_the_first_validation(world: World) -> None:
    watch = CompileWatch(CONFIG, world, Console(file=io.StringIO()), time.perf_counter())

    def minutes() -> list[float]:
        return [wait.total_seconds() / 60 for wait in timeouts(world)]

    with pytest.raises(SideJobFailedError), watch.validation():
        raise SideJobFailedError("1 of 2 ranks cannot read the held-out text")
    assert minutes() == [3]
    for expected in (FIRST_UPDATE_MINUTES, 3):
        with watch.validation():
            assert minutes() == [expected]
    assert minutes() == [3]


@pytest.mark.slow  # Compiles a model.
def test_compiled_model_with_selective_checkpointing(workspace: Workspace, tmp_path: Path) -> None:
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    train(workspace.recipe, "--run-dir", eager)
    options = ["--training.compile", "true", "--training.compile-scope", "model"]
    # Validation would compile graphs without gradients, and double the time of this test.
    options += ["--training.eval-interval", "0"]
    options += ["--training.activation-checkpointing", "selective"]
    options += ["--parallel.reshard-after-forward", "true"]
    # In a child process: torch.compile warns about itself, and pytest makes warnings errors.
    command = [sys.executable, "-m", "fastllama", "train", str(workspace.recipe), *options]
    done = subprocess.run(
        [*command, "--run-dir", str(compiled)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "graphs compiled" in done.stdout
    # Samples run in eager mode, so they add no graphs.
    assert "more graphs" not in done.stdout
    assert "parameters freed after the forward" in done.stdout
    for step, loss in losses(eager).items():
        assert float(losses(compiled)[step]) == pytest.approx(float(loss), rel=1e-4)
