"""`fastllama import` and `fastllama export`: what goes in comes out, bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastllama.cli import main
from fastllama.data.tokenizer import load_tokenizer
from fastllama.inference.load import load_run
from fastllama.model.llama import Llama
from tests.runs import train
from tests.weights.llama_folder import CONFIG, SHAPES, SINGLE, put_before_texts, write_llama
from tests.workspace import Workspace


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_export_of_an_import_is_the_source(shape: str, dtype: str, tmp_path: Path) -> None:
    source, run, result = (tmp_path / name for name in ("source", "run", "result"))
    tensors = write_llama(source, getattr(torch, dtype), **SHAPES[shape])
    main(["import", str(source), "--output", str(run)])
    main(["export", str(run), "--output", str(result), "--dtype", dtype])
    found = load_file(result / SINGLE)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values), name
    assert (result / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((result / "config.json").read_text())
    # Without a start token, the token that ends a document also begins the next.
    expected = {"rope_scaling": None} | CONFIG | SHAPES[shape] | {"bos_token_id": 1}
    assert {name: config[name] for name in expected} == expected
    # A second round changes nothing more.
    again = tmp_path / "again"
    main(["import", str(result), "--output", str(tmp_path / "run 2")])
    main(["export", str(tmp_path / "run 2"), "--output", str(again), "--dtype", dtype])
    for name in (SINGLE, "config.json"):
        assert (again / name).read_bytes() == (result / name).read_bytes()


def test_import_of_an_export_is_the_run(workspace: Workspace, tmp_path: Path) -> None:
    run, exported, result = (tmp_path / name for name in ("run", "exported", "result"))
    train(workspace.recipe, "--run-dir", run)
    main(["export", str(run), "--output", str(exported), "--dtype", "float32"])
    main(["import", str(exported), "--output", str(result)])
    first, second = (load_run(path, torch.device("cpu")) for path in (run, result))
    weights = dict(second.model.named_parameters())
    for name, values in first.model.named_parameters():
        assert torch.equal(weights.pop(name), values), name
    assert not weights
    assert first.end_token == second.end_token
    tokens = torch.arange(32)[None]
    assert torch.equal(first.model(tokens), second.model(tokens))


def test_start_token_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run, result = (tmp_path / name for name in ("source", "run", "result"))
    write_llama(source)
    put_before_texts(source)
    main(["import", str(source), "--output", str(run)])
    line = f"start  token 0, '<SOS>', in front of every prompt, as in {source}/tokenizer.json\n"
    assert line in capsys.readouterr().out
    main(["export", str(run), "--output", str(result)])
    assert (result / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    for name in ("config.json", "generation_config.json"):
        content = json.loads((result / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (0, 1)
    content = json.loads((result / "tokenizer_config.json").read_text())
    assert (content["bos_token"], content["eos_token"]) == ("<SOS>", "<EOS>")
    assert content["add_bos_token"] is True


def test_end_token_after_texts_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run, result = (tmp_path / name for name in ("source", "run", "result"))
    write_llama(source)
    put_before_texts(source, template="<SOS> $A <EOS>")
    main(["import", str(source), "--output", str(run)])
    assert "start  token 0, '<SOS>', in front of every prompt" in capsys.readouterr().out
    main(["export", str(run), "--output", str(result)])
    # A prompt that ends in an end token is not continued.
    tokenizer = load_tokenizer(result / "tokenizer.json")
    text = tokenizer.encode("def f", add_special_tokens=False).ids
    assert tokenizer.encode("def f").ids == [0, *text]
    assert tokenizer.encode("def f", "def f").ids == [0, *text, 0, *text]


def test_sentencepiece_model_is_kept(tmp_path: Path) -> None:
    source, run, result = (tmp_path / name for name in ("source", "run", "result"))
    write_llama(source)
    # Nobody reads it.
    model = bytes(range(256))
    (source / "tokenizer.model").write_bytes(model)
    main(["import", str(source), "--output", str(run)])
    assert (run / "tokenizer.model").read_bytes() == model
    main(["export", str(run), "--output", str(result)])
    assert (result / "tokenizer.model").read_bytes() == model


@pytest.mark.parametrize("prompt", ["def", "<SOS>def", ""])
def test_start_token_is_before_a_prompt(
    prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llama(tmp_path / "source")
    put_before_texts(tmp_path / "source")
    main(["import", str(tmp_path / "source"), "--output", str(tmp_path / "run")])
    capsys.readouterr()
    seen: list[int] = []
    forward = Llama.forward

    def watched(self: Llama, tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.extend(tokens[0].tolist())
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(Llama, "forward", watched)
    command = ["generate", str(tmp_path / "run"), "--prompt", prompt, "--max-new-tokens", "1"]
    main([*command, "--device", "cpu", "--special-tokens"])
    text = load_tokenizer(tmp_path / "run" / "tokenizer.json").encode(prompt.removeprefix("<SOS>"))
    assert seen == text.ids
    assert seen.count(0) == 1
    assert capsys.readouterr().out.startswith(prompt)
