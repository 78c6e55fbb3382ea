"""The command line on the null device, end to end: what a user types on a machine with GPUs."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.rehearsal.build import environment
from benchmarks.rehearsal.case import CONFIGS

FASTLLAMA = ["-m", "benchmarks.rehearsal.command"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *FASTLLAMA]
WARNINGS = re.compile(r"\w*Warning: .*")


@dataclass(frozen=True)
class Step:
    """A command, and what it must do."""

    title: str
    arguments: list[str]
    prints: str
    """A pattern in its output."""
    code: int = 0
    variables: dict[str, str] = field(default_factory=dict)


def steps(folder: Path) -> Iterator[Step]:
    """All commands, in order."""
    corpus, tokenizer, data = (str(folder / name) for name in ("text.jsonl", "t.json", "data"))
    lines = (json.dumps({"text": f"the {n}th document of {n % 7} words " * 40}) for n in range(900))
    Path(corpus).write_text("\n".join(lines) + "\n")
    yield Step(
        "tokenizer train",
        [*FASTLLAMA, "tokenizer", "train", "--input", corpus, "--output", tokenizer],
        r"t\.json",
    )
    held = ["--validation-fraction", "0.1"]
    yield Step(
        "prepare",
        [
            *FASTLLAMA,
            "prepare",
            "--input",
            corpus,
            "--tokenizer",
            tokenizer,
            "--output",
            data,
            *held,
        ],
        r"tokens",
    )
    settings = {
        "--data.path": data,
        "--model.n-layers": "2",
        "--training.batch-size": "2",
        "--training.tokens-per-update": "8192",
        "--training.training-tokens": "32768",
        "--training.eval-interval": "2",
        "--training.eval-tokens": "4096",
        "--optimizer.warmup-iterations": "0",
        "--checkpoint.interval-tokens": "16384",
        "--logging.log-interval": "1",
        "--logging.sample-interval": "2",
        "--logging.sample-tokens": "4",
        "--logging.sample-prompt": "the",
    }
    recipe = ["train", str(CONFIGS / "llama-100m.toml")]
    recipe += [part for setting in settings.items() for part in setting]
    for title, launcher, compiles in (
        ("1 rank", FASTLLAMA, "true"),
        ("2 ranks", TORCHRUN, "false"),
    ):
        run = str(folder / title)
        longer = ["--training.training-tokens", "49152"]
        yield Step(
            f"train, {title}, attention auto",
            [*launcher, *recipe, "--run-dir", run, "--training.compile", compiles],
            r"attention (cudnn|flash): .*step 4.* val .*saved .*step-00000004",
        )
        yield Step(
            f"resume, {title}",
            [*launcher, "train", "--resume", run, *longer],
            "resuming after update 4",
        )
        yield Step(
            f"generate, {title}",
            [*FASTLLAMA, "generate", run, "--prompt", "the", "--max-new-tokens", "4"],
            "^the",
        )
    yield Step(
        "a rank fails",
        [*TORCHRUN, *recipe, "--run-dir", str(folder / "fails"), "--training.compile", "false"],
        "rank 1.*a failure on purpose",
        code=1,
        variables={"FAILING_RANK": "1"},
    )


def run_end_to_end(libraries: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Run all commands; yield the title of each, and what is wrong or nothing."""
    for step in steps(folder):
        variables = {
            "NULL_CUDA_DEVICES": "2",
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(libraries / "inductor"),
            "TRITON_CACHE_DIR": str(libraries / "triton"),
        }
        done = subprocess.run(
            [sys.executable, *step.arguments],
            capture_output=True,
            text=True,
            check=False,
            env=environment(libraries, **variables, **step.variables),
        )
        output = done.stdout + done.stderr
        (folder / f"{step.title}.log").write_text(output)
        if done.returncode != step.code:
            lines = output.strip().splitlines() or ["nothing printed"]
            yield step.title, f"exit code {done.returncode} instead of {step.code}: {lines[-1]}"
        elif not re.search(step.prints, output, re.MULTILINE | re.DOTALL):
            yield step.title, f"its output has no {step.prints!r}"
        elif warning := WARNINGS.search(done.stderr):
            yield step.title, f"the user sees a warning: {warning[0]}"
        else:
            yield step.title, ""
