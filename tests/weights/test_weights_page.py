"""The commands of docs/weights.md about runs that start from others, on a smaller quickstart."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from fastllama.cli import main
from tests.runs import rows
from tests.weights.llama_folder import write_llama
from tests.workspace import Workspace

ROOT = Path(__file__).parents[2]


def blocks(section: str, language: str) -> list[str]:
    """The blocks of code of one section of the page."""
    page = (ROOT / "docs" / "weights.md").read_text()
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(section: str) -> list[str]:
    """The commands of one section of the page."""
    return [line for block in blocks(section, "sh") for line in block.splitlines()]


@pytest.fixture
def quickstart(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the recipes of the page over the small model, and runs/quickstart."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    recipe = workspace.recipe.read_text()
    for option, value in {
        "tokens_per_update": 2048,
        "batch_size": 8,
        "max_seq_len": 128,
        "training_tokens": 40_960,
        "n_layers": 1,
        "eval_interval": 100,
        "min_lr": "1e-4",
        "sample_interval": 0,
    }.items():
        recipe, n_replaced = re.subn(rf"^{option} = .*", f"{option} = {value}", recipe, flags=re.M)
        assert n_replaced == 1
    (tmp_path / "configs" / "quickstart.toml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "fastllama"
    main(arguments)


@pytest.mark.slow
def test_commands(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands("Export"):
        run(command)
    assert Path("models/quickstart/model.safetensors").is_file()
    (continued,) = commands("Start from weights")
    run(continued)
    weights = "weights runs/quickstart/checkpoints/step-00000020"
    assert weights in capsys.readouterr().out.replace(f"{quickstart}/", "")

    older, longer, held, annealed = commands("Branches")
    run(held)
    assert "step-00000160" in {
        path.name for path in Path("runs/quickstart-wsd/checkpoints").iterdir()
    }
    run(older)
    assert "resuming after update 180 of 200" in capsys.readouterr().out
    run(longer)
    assert "resuming after update 200 of 220" in capsys.readouterr().out
    run(annealed)
    rates = [float(row["lr"]) for row in rows(Path("runs/annealed"))]
    assert len(rates) == 40
    # The decay begins at once and ends at min_lr.
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (pytest.approx(1e-2 - 9.9e-3 / 40), pytest.approx(1e-4))

    (merged,) = commands("Merge")
    run(merged)
    assert "merged 2 checkpoints into runs/merged" in capsys.readouterr().out
    averaged, generated = commands("The average of the weights")
    run(averaged)
    capsys.readouterr()
    run(generated)
    assert capsys.readouterr().out.startswith("def ")


@pytest.mark.extra
def test_script_of_the_export(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="make test-all installs it")
    (trained, exported, generated), (script,) = commands("Export"), blocks("Export", "python")
    run(trained)
    run(exported)
    texts = []
    for program in (lambda: run(generated), lambda: exec(script, {})):
        capsys.readouterr()
        program()
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 64


@pytest.mark.extra
def test_command_of_a_gguf_file(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf", reason="make test-all installs it")
    run(commands("Export")[0])
    (exported,) = commands("GGUF")
    run(exported)
    assert "next: llama-cli -m models/quickstart.gguf -no-cnv -p TEXT\n" in capsys.readouterr().out
    found = gguf.GGUFReader("models/quickstart.gguf")
    assert found.fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_commands_of_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_llama(Path("models/SmolLM2-135M"))
    Path("notes.txt").write_text("def self return\n" * 2000)
    (recipe,) = blocks("Import", "toml")
    recipe, n_replaced = re.subn(
        r"(max_seq_len|training_tokens|tokens_per_update|warmup_iterations) = \S+",
        lambda found: f"{found[1]} = {SMALL[found[1]]}",
        recipe,
    )
    assert n_replaced == len(SMALL)
    Path("notes.toml").write_text(f'{recipe}device = "cpu"\ncompile = false\n')
    imported, generated, prepared, trained = commands("Import")
    run(imported)
    capsys.readouterr()
    run(generated)
    assert capsys.readouterr().out.startswith("def ")
    run(prepared)
    run(trained)
    printed = capsys.readouterr().out
    assert "weights runs/smollm2/checkpoints/step-00000000; model.max_seq_len = 16" in printed
    assert "starting of 2" in printed
    assert Path("runs/notes/checkpoints/step-00000002").is_dir()


SMALL = {
    "max_seq_len": 16,
    "training_tokens": 256,
    "tokens_per_update": 128,
    "warmup_iterations": 1,
}
