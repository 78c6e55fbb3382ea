"""`fastllama export`: tensors, logits, gradients and text of transformers; errors."""

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

import fastllama.weights.export as module
from fastllama.atomic import locked
from fastllama.cli import main
from fastllama.config import ModelConfig
from fastllama.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from fastllama.inference.load import load_run
from fastllama.weights.llama_layout import tensors as layout
from fastllama.weights.source import Source
from tests.cli.refusal import refusal
from tests.data import foreign
from tests.runs import losses, train
from tests.weights.llama_folder import (
    INDEX,
    LLAMA_3_SCALING,
    SHAPES,
    SINGLE,
    put_before_texts,
    write_llama,
)
from tests.workspace import Workspace

CPU = torch.device("cpu")
LLAMA_3_2 = {
    "rope_theta": 500000.0,
    "rope_scaling": {**LLAMA_3_SCALING, "factor": 32.0},
    "tie_word_embeddings": True,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
}
ALL_SHAPES: dict[str, dict[str, Any]] = {
    **SHAPES,
    # All heads of Llama 3.2, 32 and 24 over 8 for keys and values, of their real widths; the rest
    # is a quarter as wide.
    "Llama 3.2 1B": LLAMA_3_2
    | {"hidden_size": 512, "num_attention_heads": 32, "head_dim": 64, "intermediate_size": 2048},
    "Llama 3.2 3B": LLAMA_3_2
    | {"hidden_size": 768, "num_attention_heads": 24, "head_dim": 128, "intermediate_size": 2048},
}


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 updates with an average of its weights."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(workspace.recipe, "--run-dir", run, "--training.ema-decay", 0.5)
    return run


def imported_and_exported(
    folder: Path, dtype: torch.dtype, *options: str, **fields: Any
) -> tuple[dict[str, Tensor], Path, Path]:
    """Tensors of a folder of transformers, the run that it becomes, and the export of this run."""
    tensors = write_llama(folder / "llama", dtype, **fields)
    run, output = folder / "run", folder / "export"
    main(["import", str(folder / "llama"), "--output", str(run)])
    main(["export", str(run), "--output", str(output), "--dtype", str(dtype)[6:], *options])
    return tensors, run, output


def exported_tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_files_are_filled_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 30_000
    monkeypatch.setattr(module, "FILE_BYTES", limit)
    tensors, _, output = imported_and_exported(tmp_path, torch.bfloat16)
    assert not (output / SINGLE).exists()
    index = json.loads((output / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert n > 2
    sizes = []
    for file in files:
        stored = load_file(output / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(stored)
        sizes.append(sum(tensor.nbytes for tensor in stored.values()))
    assert max(sizes) <= limit
    # No two neighbours fit into one file.
    assert all(a + b > limit for a, b in itertools.pairwise(sizes))


# Prints by how much the memory of an export exceeds that before it, in bytes.
PEAK = """
import sys
from pathlib import Path
from fastllama.weights.export import export

def memory(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

export(Path(sys.argv[1]), Path(sys.argv[2]))
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
export(Path(sys.argv[3]), Path(sys.argv[4]))
print(memory("VmHWM") - before)
"""


def test_memory_is_bounded_by_a_weight(tmp_path: Path) -> None:
    paths = []
    for name, fields in (("small", {}), ("large", {"num_hidden_layers": 40, "hidden_size": 512})):
        write_llama(tmp_path / name, torch.bfloat16, **fields)
        run = tmp_path / f"{name} run"
        main(["import", str(tmp_path / name), "--output", str(run)])
        paths += [str(run), str(tmp_path / f"{name} export")]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=True
    )
    # The largest weight, q, k and v, has 2 MiB in float32; the rest is what the allocator keeps.
    assert (Path(paths[3]) / SINGLE).stat().st_size > 2**26
    assert int(done.stdout) < 16 * 2**20


def test_export_of_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "export"
    main(["export", str(trained), "--output", str(output)])
    printed = capsys.readouterr().out
    assert (
        f"exported {trained / 'checkpoints' / 'step-00000010'} to {output} in bfloat16" in printed
    )
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model = load_run(trained, CPU).model
    found, parameters = exported_tensors(output), dict(model.named_parameters())
    for name, rows in layout(model.config).items():
        part = parameters[rows.parameter][rows.start : rows.start + rows.shape[0]]
        assert torch.equal(found[name], part.bfloat16()), name
    end_token = load_run(trained, CPU).end_token
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == end_token
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config["eos_token"] == config["bos_token"] == "<EOS>"
    assert "unk_token" not in config
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    card = (output / "README.md").read_text()
    assert "| trained on | 2,560 tokens in 10 updates, of the data in " in card
    assert f"| training loss | {float(losses(trained)[10]):.4f}, after update 10 |" in card
    assert (trained / "config.toml").read_text().rstrip() in card


@pytest.mark.parametrize("kind", ["without pre-tokenizer", "unigram", "word piece"])
def test_token_of_unknown_text(kind: str, tmp_path: Path) -> None:
    source, run, output = (tmp_path / name for name in ("source", "run", "export"))
    write_llama(source)
    save_tokenizer(foreign.ALL[kind](), source / "tokenizer.json")
    main(["import", str(source), "--output", str(run)])
    main(["export", str(run), "--output", str(output)])
    assert json.loads((output / "tokenizer_config.json").read_text())["unk_token"] == "<unk>"


def test_older_checkpoint_and_average(trained: Path, tmp_path: Path) -> None:
    older, average = tmp_path / "older", tmp_path / "average"
    checkpoint = trained / "checkpoints" / "step-00000005"
    main(["export", str(checkpoint), "--output", str(older), "--dtype", "float32"])
    main(["export", str(trained), "--output", str(average), "--dtype", "float32", "--ema"])
    for folder, source, prefix in ((older, checkpoint, "model."), (average, trained, "ema.")):
        model = load_run(source, CPU, prefix).model
        norm = exported_tensors(folder)["model.norm.weight"]
        assert torch.equal(norm, model.norm.weight)
    assert "in 5 updates" in (older / "README.md").read_text()


def test_refusals(
    trained: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, bounded, there = tmp_path / "damaged", tmp_path / "bounded", tmp_path / "there"
    shutil.copytree(trained, damaged, symlinks=True)
    for shard in damaged.glob("checkpoints/step-*/*.safetensors"):
        shard.write_bytes(b"")
    train(workspace.recipe, "--run-dir", bounded, "--model.logit-softcap", 20)
    there.mkdir()
    before = sorted(tmp_path.iterdir())
    for run, output, expected in (
        (tmp_path / "gone", "new", "is not a run folder: it does not exist"),
        (
            trained,
            "new.gguf",
            "new.gguf names a GGUF file, and without --gguf it would be a folder",
        ),
        (trained, "NEW.GGUF", "NEW.GGUF names a GGUF file, and without --gguf"),
        (trained, "new/..", "new/.. ends in no name: choose another --output"),
        (trained / "checkpoints" / "step-00000007", "new", "There is no checkpoint "),
        (damaged, "new", "has no whole checkpoint: "),
        (damaged / "checkpoints" / "latest", "new", "The checkpoint is damaged: "),
        (bounded, "new", "model.logit_softcap = 20.0; it cannot be exported."),
        (trained, "there", f"output {there} exists: choose another --output"),
    ):
        message = refusal(capsys, "export", run, "--output", tmp_path / output)
        assert expected in message
        assert sorted(tmp_path.iterdir()) == before
    message = refusal(capsys, "export", bounded, "--output", tmp_path / "new", "--ema")
    assert "step-00000010 has no average of the weights; leave out --ema" in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_failed_write_leaves_nothing(
    number: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Source.read

    def fail_in_the_middle(self: Source, names: Iterable[str]) -> Iterator[Tensor]:
        yield next(original(self, names))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Source, "read", fail_in_the_middle)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        module.export(trained, tmp_path / "models" / "export")
    assert error.value.filename.endswith("model.safetensors")
    assert not os.listdir(tmp_path)


def test_killed_export_leaves_nothing_in_the_way(trained: Path, tmp_path: Path) -> None:
    left = tmp_path / ".export.partial" / "export"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    main(["export", str(trained), "--output", str(tmp_path / "export")])
    assert os.listdir(tmp_path) == ["export"]
    assert exported_tensors(tmp_path / "export")


def test_export_at_the_same_time_as_another(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = tmp_path / ".export.partial"
    hidden.mkdir()
    with locked(hidden):
        line = refusal(capsys, "export", trained, "--output", tmp_path / "export")
    assert f"another process is writing into {hidden}: wait until it exits, or stop it" in line
    assert hidden.is_dir()
    main(["export", str(trained), "--output", str(tmp_path / "export")])


def test_name_that_is_not_utf8(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / os.fsdecode(b"caf\xe9")
    main(["export", str(trained), "--output", str(output)])
    assert "# caf\\xe9\n" in (output / "README.md").read_text()


def test_unwritable_folder(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = refusal(capsys, "export", trained, "--output", tmp_path / "file" / "export")
    assert f"{tmp_path / 'file'} is not a writable folder: choose another --output" in line
    assert os.listdir(tmp_path) == ["file"]


def test_files_of_the_run_that_do_not_belong_together(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    recipe = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub("^theta = .*", "theta = 7.0", recipe, flags=re.M))
    for path in (run, run / "checkpoints" / "step-00000005"):
        line = refusal(capsys, "export", path, "--output", tmp_path / "export")
        assert f"with model.theta = 10000.0, not 7.0; restore that value in {run}/config" in line
    (run / "config.toml").write_text(recipe)
    save_tokenizer(train_tokenizer(map(str, range(2000)), 321), run / "tokenizer.json")
    line = refusal(capsys, "export", run, "--output", tmp_path / "export")
    assert "has 321 token ids and the model 320; restore the tokenizer of the run" in line
    (run / "tokenizer.json").unlink()
    for command in (("export", run, "--output", tmp_path / "export"), ("generate", run)):
        line = refusal(capsys, *command)
        assert f"{run}/tokenizer.json does not exist; restore the tokenizer of the run" in line
    assert os.listdir(tmp_path) == ["run"]


def test_tokenizer_adds_no_tokens(trained: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "export"
    shutil.copytree(trained, run, symlinks=True)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    plain = tokenizer.encode("def return " * 40).ids
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<SOS> $A <EOS>", special_tokens=[("<SOS>", 0), ("<EOS>", 1)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.save(str(run / "tokenizer.json"))
    main(["export", str(run), "--output", str(output)])
    assert (
        Tokenizer.from_file(str(output / "tokenizer.json")).encode("def return " * 40).ids == plain
    )


def test_export_then_import_trains_the_same(
    trained: Path, workspace: Workspace, tmp_path: Path
) -> None:
    main(["export", str(trained), "--output", str(tmp_path / "export"), "--dtype", "float32"])
    main(["import", str(tmp_path / "export"), "--output", str(tmp_path / "imported")])
    followed = []
    for number, source in enumerate((trained, tmp_path / "export", tmp_path / "imported")):
        run = tmp_path / f"run{number}"
        train(workspace.recipe, "--run-dir", run, "--training.init-from", source)
        followed.append(losses(run))
    assert followed[0] == followed[1] == followed[2]


def of_transformers(folder: Path, dtype: torch.dtype) -> Any:
    transformers = pytest.importorskip("transformers", reason="make test-all installs it")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.to(dtype).eval()


def tokens_of(model: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocab_size, (2, model.max_seq_len), generator=generator)


@pytest.mark.extra
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_logits_and_gradients_are_those_of_transformers(shape: str, tmp_path: Path) -> None:
    _, run, output = imported_and_exported(tmp_path, torch.float32, **ALL_SHAPES[shape])
    ours, theirs = load_run(run, CPU).model, of_transformers(output, torch.float32)
    exact = of_transformers(output, torch.float64)
    tokens = tokens_of(ours.config)
    expected = exact(tokens).logits
    for found in (ours(tokens), theirs(tokens).logits):
        # A few hundred sums of float32, each rounded to 6e-8.
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    ours(tokens, tokens.roll(-1)).backward()
    logits = exact(tokens).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens.roll(-1).flatten()).backward()
    gradients = {name: weight.grad for name, weight in exact.named_parameters()}
    own = dict(ours.named_parameters())
    for name, rows in layout(ours.config).items():
        gradient = own[rows.parameter].grad
        assert gradient is not None
        found = gradient[rows.start : rows.start + rows.shape[0]]
        # A gradient is a sum over all tokens: float32 rounds it in proportion to the largest.
        error = (found - gradients[name]).abs().max()
        assert error < 1e-5 * gradients[name].abs().max(), name


@pytest.mark.extra
@pytest.mark.parametrize("shape", ["Llama 3.1", "Llama 3.2 1B"])
def test_bfloat16_logits_differ_by_their_rounding(shape: str, tmp_path: Path) -> None:
    _, run, output = imported_and_exported(tmp_path, torch.bfloat16, **ALL_SHAPES[shape])
    # The weights were bfloat16, so float64 computes the exact logits of both.
    exact, theirs = of_transformers(output, torch.float64), of_transformers(output, torch.bfloat16)
    ours = load_run(run, CPU).model
    for parameter in ours.parameters():
        parameter.data = parameter.data.bfloat16()
    tokens = tokens_of(ours.config)
    expected = exact(tokens).logits
    errors = [
        (found.double() - expected).norm() / expected.norm()
        for found in (ours(tokens), theirs(tokens).logits)
    ]
    # Two layers round about ten times each, to 2^-9 relative, independently.
    assert max(errors) < 20**0.5 * 2**-8
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.extra
def test_text_is_that_of_transformers(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="make test-all installs it")
    run, output, prompt = tmp_path / "run", tmp_path / "export", "def f"
    # A context that holds 64 new tokens.
    train(workspace.recipe, "--run-dir", run, "--model.max-seq-len", 128)
    main(["export", str(run), "--output", str(output), "--dtype", "float32"])
    capsys.readouterr()
    options = ["--dtype", "float32", "--temperature", "0", "--max-new-tokens", "64"]
    main(["generate", str(run), "--prompt", prompt, *options])
    ours = capsys.readouterr().out.removesuffix("\n")
    model = of_transformers(output, torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    inputs = tokenizer(prompt, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    assert tokenizer.decode(generated[0], skip_special_tokens=True) == ours
    assert len(generated[0]) == inputs["input_ids"].shape[1] + 64


@pytest.mark.extra
def test_text_after_a_start_token_is_that_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="make test-all installs it")
    source, run, output = (tmp_path / name for name in ("source", "run", "export"))
    write_llama(source, max_position_embeddings=128)
    put_before_texts(source)
    main(["import", str(source), "--output", str(run)])
    main(["export", str(run), "--output", str(output), "--dtype", "float32"])
    capsys.readouterr()
    options = ["--dtype", "float32", "--temperature", "0", "--max-new-tokens", "64"]
    main(["generate", str(run), "--prompt", "def self", *options])
    ours = capsys.readouterr().out.removesuffix("\n")
    model = of_transformers(output, torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    inputs = tokenizer("def self", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id == 0
    generated = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    assert tokenizer.decode(generated[0, 1:]) == ours
