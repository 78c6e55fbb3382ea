"""The console prints text as it is, and drives no terminal. Ctrl-C ends compiled code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastllama.console import Console


def test_text_is_data(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]12[/bold] :heart: $A_$B %s {} " + 30 * "words " + "\nnext"
    Console().print(text)
    assert capsys.readouterr().out == text + "\n"
    Console(stderr=True).print("\x1b[2J\r\x9b \udcff", 3)
    assert capsys.readouterr().err == "\\x1b[2J\\r\\x9b \\xff 3\n"
    Console(quiet=True).print("nothing")
    assert capsys.readouterr().out == ""


TRAIN_TOKENIZER = """
import random
from fastllama.data.tokenizer import train_tokenizer

draw = random.Random(0)
def texts():
    for _ in range(300):
        yield " ".join("".join(draw.choices("abcdefgh", k=8)) for _ in range(1000))
    print("training", flush=True)

train_tokenizer(texts(), 60_000)
print("trained")
"""
WAIT_FOR_OTHERS = """
from fastllama.config import Config, TrainingConfig
from fastllama.distributed.world import distributed
from fastllama.training.stopping import stop_signals

with stop_signals(), distributed(Config(training=TrainingConfig(device="cpu"))):
    print("met")
"""
LAUNCHER = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@pytest.mark.parametrize(
    ("program", "sign", "environment"),
    [(TRAIN_TOKENIZER, "training", {}), (WAIT_FOR_OTHERS, "waiting for 2 processes", LAUNCHER)],
    ids=["training a tokenizer", "waiting for other processes"],
)
def test_ctrl_c_ends_compiled_code(program: str, sign: str, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert sign in process.stdout.readline()
            # Into the call of compiled code.
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            began = time.perf_counter()
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output) == (-signal.SIGINT, "")
    # Either call would take longer.
    assert time.perf_counter() - began < 2
