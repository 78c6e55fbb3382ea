"""`fastllama prepare --part` and `fastllama data join`; the section of docs/data.md on them."""

import errno
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllama import atomic
from fastllama.cli import main
from fastllama.data.manifest import Manifest
from fastllama.data.parts import Part
from fastllama.data.prepare import prepare
from tests.cli.refusal import refusal
from tests.workspace import Workspace

ROOT = Path(__file__).parents[2]
(SECTION,) = re.findall(
    r"^## Many machines\n(.*?)(?=^## )",
    (ROOT / "docs" / "data.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


def blocks(language: str) -> list[str]:
    """The blocks of code of the section."""
    return re.findall(rf"^```{language}\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


@pytest.fixture
def command(workspace: Workspace, tmp_path: Path) -> list[str]:
    return [
        *("prepare", "--input", str(workspace.corpus), "--tokenizer", str(workspace.tokenizer)),
        *("--output", str(tmp_path / "data")),
    ]


@pytest.fixture
def array(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variables of a task of a SLURM array."""

    def set_task(task: int, first: int, last: int, count: int) -> None:
        for name, value in {"ID": task, "MIN": first, "MAX": last, "COUNT": count}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))

    return set_task


def test_commands_of_the_page(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus").symlink_to(workspace.corpus)
    Path("tokenizer.json").symlink_to(workspace.tokenizer)
    *prepared, joined = blocks("sh")[0].splitlines()
    for line in prepared:
        main(shlex.split(line)[1:])
    assert "next: fastllama data join data/mine, when all 4 parts" in capsys.readouterr().out
    for done in ("", "data/mine is already complete\n"):
        main(shlex.split(joined)[1:])
        printed = capsys.readouterr()
        assert "data/mine train: " in printed.out
        assert " tokens in 80 documents\nnext: fastllama train" in printed.out
        assert printed.err == done
    main(["data", "check", "data/mine"])
    assert "every shard matches its checksum" in capsys.readouterr().out
    main(shlex.split(prepared[0])[1:])
    assert "next: " not in capsys.readouterr().out


def test_ray_of_the_page(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remote(**_: object) -> Callable[[Callable[..., Any]], object]:
        return lambda function: types.SimpleNamespace(remote=function)

    ray = types.SimpleNamespace(remote=remote, init=lambda address: None, get=list)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    (script,) = (block for block in blocks("python") if "import ray" in block)
    for path, own in {
        "/shared/corpus": workspace.corpus,
        "/shared/tokenizer.json": workspace.tokenizer,
        "/shared/data/mine": tmp_path / "data",
        "N_PARTS = 16": "N_PARTS = 2",
        "workers=32": "workers=1",
    }.items():
        assert path in script
        script = script.replace(path, str(own))
    exec(script, {})
    assert Manifest.load(tmp_path / "data").splits["train"].documents == 80


@pytest.mark.slow
def test_array_of_the_page(workspace: Workspace, tmp_path: Path) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_MAX": "2",
        "SLURM_ARRAY_TASK_COUNT": "2",
        "SLURM_ARRAY_TASK_STEP": "1",
    }
    paths = ["--input", workspace.corpus, "--tokenizer", workspace.tokenizer]
    script = ["bash", ROOT / "docs" / "prepare_slurm.sh", *paths, "--output", "data/mine"]
    for task in ("1", "2"):
        task_environment = environment | {"SLURM_ARRAY_TASK_ID": task}
        subprocess.run(script, cwd=tmp_path, env=task_environment, check=True)
    (join,) = re.findall('--wrap "(.*)"', blocks("sh")[1])
    subprocess.run(shlex.split(join), cwd=tmp_path, env=environment, check=True)
    assert Manifest.load(tmp_path / "data" / "mine").splits["train"].documents == 80
    assert f'--wrap "{join}"' in (ROOT / "docs" / "prepare_slurm.sh").read_text()


def test_task_of_an_array_is_a_part(
    command: list[str],
    array: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    array(0, 0, 1, 2)
    main(command)
    first = "part 1/2, by the SLURM array of this task; --part chooses another\n"
    assert capsys.readouterr().out.startswith(first)
    main([*command, "--part", "2/2"])
    assert "SLURM" not in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        Part(1, 2).folder,
        Part(2, 2).folder,
    }
    array(3, 3, 7, 2)
    assert "or give --part" in refusal(capsys, *command)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("0/4", "part 0/4 does not exist: the parts are 1/4 to 4/4"),
        ("5/4", "part 5/4 does not exist"),
        ("1/0", "part 1/0 does not exist"),
        ("1/100000", "part 1/100000 is one of more than 99,999: choose fewer parts"),
        ("2", "part '2' is not of the form I/N, such as 2/16"),
        ("x/y", "part 'x/y' is not of the form"),
        ("1 / 4", "part '1 / 4' is not of the form"),
        ("-1/4", "part '-1/4' is not of the form"),
        ("\u0661/\u0664", "is not of the form"),
        ("1/4/4", "is not of the form"),
        ("", "part '' is not of the form"),
        ("1" * 5000 + "/4", "is not of the form"),
    ],
)
def test_part_that_does_not_exist(
    command: list[str], tmp_path: Path, part: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, *command, f"--part={part}")
    assert not (tmp_path / "data").exists()


def test_refused_joins(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    assert "data does not exist: name the --output of" in refusal(capsys, "data", "join", data)
    main([*command, "--part", "2/3"])
    sentence = "lacks 2 of 3 parts (1/3, 3/3): prepare them with --part, and join again"
    assert sentence in refusal(capsys, "data", "join", data)
    assert "holds parts that are not joined" in refusal(capsys, "data", "check", data)
    assert "holds parts: prepare the others" in refusal(capsys, *command)


def test_read_only_folder(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    prepare([str(workspace.corpus)], workspace.tokenizer, data, part=Part(1, 1))
    before = sorted(data.rglob("*"))

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(atomic, "open_new", refuse)
    sentence = refusal(capsys, "data", "join", data)
    assert "Read-only file system; choose a path on a disk that can be written" in sentence
    assert sorted(set(data.rglob("*")) - {data / ".lock"}) == before
