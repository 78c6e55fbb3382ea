"""`fastllama import` and `fastllama export`: what goes in comes out, bit by bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastllama.cli import main
from fastllama.inference.load import load_run
from tests.runs import train
from tests.weights.llama_folder import CONFIG, SHAPES, SINGLE, write_llama
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
    # fastllama has one special token, which ends a document and begins the next.
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
