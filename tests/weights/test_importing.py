"""`fastllama import`: weights, tokenizer and end token; damaged and foreign folders."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastllama import typed_json
from fastllama.checkpoints.reading import find_damage, load_tensors
from fastllama.cli import main
from fastllama.data.prepare import prepare
from fastllama.inference.load import load_run
from fastllama.run_folder import RunFolder
from fastllama.weights.llama_layout import ArchitectureJson, LlamaJson
from tests.cli.refusal import refusal
from tests.runs import rows, train
from tests.weights.llama_folder import (
    CONFIG,
    INDEX,
    LLAMA_3_SCALING,
    SHAPES,
    SINGLE,
    put_before_texts,
    save_sharded,
    write_llama,
)
from tests.workspace import Workspace

CHECKPOINT = Path("checkpoints", "step-00000000")
CPU = torch.device("cpu")


def imported(folder: Path) -> Path:
    """The run folder that an import makes of `folder`."""
    output = folder.with_name("run")
    main(["import", str(folder), "--output", str(output)])
    return output


def saved_tensors(run: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint of update 0."""
    found = {}
    for shard in (run / CHECKPOINT).glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers as docs/checkpoints.md says that a checkpoint holds them."""

    def rows_of(layer: int, *names: str) -> Tensor:
        return torch.cat([tensors[f"model.layers.{layer}.{name}.weight"] for name in names])

    found = {
        "model.embedding.weight": tensors["model.embed_tokens.weight"],
        "model.norm.weight": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        found["model.output.weight"] = tensors["lm_head.weight"]
    for layer in range(CONFIG["num_hidden_layers"]):
        attention = [f"self_attn.{name}_proj" for name in "qkv"]
        block = f"model.blocks.{layer}"
        found |= {
            f"{block}.attention_norm.weight": rows_of(layer, "input_layernorm"),
            f"{block}.attention.qkv.weight": rows_of(layer, *attention),
            f"{block}.attention.output.weight": rows_of(layer, "self_attn.o_proj"),
            f"{block}.mlp_norm.weight": rows_of(layer, "post_attention_layernorm"),
            f"{block}.mlp.gate_up.weight": rows_of(layer, "mlp.gate_proj", "mlp.up_proj"),
            f"{block}.mlp.down.weight": rows_of(layer, "mlp.down_proj"),
        }
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_is_kept(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = write_llama(tmp_path / "llama", dtype, n_files=3, **SHAPES[shape])
    run = imported(tmp_path / "llama")
    found, expected = saved_tensors(run), packed(tensors)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], values.float()), name
    assert find_damage(run / CHECKPOINT) is None
    assert os.readlink(run / "checkpoints" / "latest") == CHECKPOINT.name
    # As torch.distributed.checkpoint reads it, into memory that holds something else.
    read = {name: torch.full_like(values, 7.0) for name, values in found.items()}
    load_tensors(run / CHECKPOINT, read)
    assert all(torch.equal(read[name], found[name]) for name in found)


@pytest.mark.extra
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="make test-all installs it")
    # transformers writes into the options of the rotary embedding.
    fields = copy.deepcopy(CONFIG | SHAPES[shape])
    # Weights of this size give logits and attention scores near 1.
    config = transformers.LlamaConfig(**fields, initializer_range=0.2)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    write_llama(tmp_path / "tokenizer")
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", tmp_path / "llama")
    tokens = torch.randint(0, 270, (2, 24))
    with torch.no_grad():
        logits = load_run(imported(tmp_path / "llama"), CPU).model(tokens)
        # Read again: a conversion of the model would also round its rotary frequencies.
        model = model.from_pretrained(tmp_path / "llama", dtype=torch.float32)
        exact = model.double()(tokens).logits
    assert exact.std() > 0.3
    # The logits are up to 4, with rounding errors of float32, 6e-8, in a few hundred sums each.
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5)


def test_generates_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "llama", max_position_embeddings=131072)
    run = imported(tmp_path / "llama")
    printed = capsys.readouterr().out
    assert "context of 131,072 tokens" in printed
    assert f"end    token 1, '<EOS>', as in {tmp_path}/llama/config.json\n" in printed
    command = re.search(r"fastllama (generate .*) --prompt TEXT", printed)
    assert command is not None
    main([*command[1].split(), "--prompt", "def", "--max-new-tokens", "4", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("def")
    loaded = load_run(run, CPU)
    assert loaded.end_token == 1
    assert (run / "tokenizer.json").read_bytes() == (tmp_path / "llama/tokenizer.json").read_bytes()
    (session,) = json.loads((run / "environment.json").read_text())
    assert "fastllama" in session


def test_new_run_starts_from_it(workspace: Workspace, tmp_path: Path) -> None:
    tensors = write_llama(tmp_path / "llama", max_position_embeddings=131072)
    run = imported(tmp_path / "llama")
    data = tmp_path / "data"
    prepare([str(workspace.corpus)], run / "tokenizer.json", data, shard_tokens=3000)
    # The options of the imported model are the recipe, and the context is shorter.
    train(
        run / "config.toml",
        *("--run-dir", tmp_path / "next", "--training.init-from", run, "--data.path", data),
        *("--model.max-seq-len", 32, "--training.batch-size", 2),
        *("--training.tokens-per-update", 64, "--training.training-tokens", 128),
        *("--training.device", "cpu", "--training.compile", "false"),
        *("--optimizer.warmup-iterations", 0, "--optimizer.max-lr", 1e-30),
        *("--optimizer.min-lr", 0, "--logging.log-interval", 1),
    )
    assert len(rows(tmp_path / "next")) == 2
    found = load_run(tmp_path / "next", CPU).model
    assert torch.equal(found.embedding.weight, tensors["model.embed_tokens.weight"])


def test_resume_names_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "llama")
    run = imported(tmp_path / "llama")
    sentence = (
        f"error: {run} has weights without the moments of AdamW, so there is nothing to resume; "
        f"start a new run from them in another folder with --training.init-from {run}.\n"
    )
    assert refusal(capsys, "train", "--resume", run) == sentence
    assert refusal(capsys, "train", run / "config.toml", "--run-dir", run) == sentence
    message = refusal(capsys, "data", "show", run, "--step", "1")
    assert f"{run} has not trained yet, so it has no updates; name the place by" in message
    latest, branch = run / "checkpoints" / "latest", tmp_path / "branch"
    assert refusal(capsys, "train", "--resume", latest, "--run-dir", branch) == sentence
    assert not branch.exists()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 1, (1, "config.json", "")),
        (None, [2, 1], (2, "config.json", ", the first of 2")),
        ({"eos_token_id": [3, 1, 2]}, 1, (3, "generation_config.json", ", the first of 3")),
        ({"eos_token_id": 2}, None, (2, "generation_config.json", "")),
        ({"temperature": 1.0}, 1, (1, "config.json", "")),
    ],
)
def test_end_token(
    generation: Any,
    config: Any,
    expected: tuple[int, str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "llama"
    write_llama(folder, eos_token_id=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    run = imported(folder)
    token, file, choice = expected
    text = {1: "<EOS>", 2: "<PAD>", 3: "<UNK>"}[token]
    line = f"end    token {token}, {text!r}, as in {folder}/{file}{choice}\n"
    assert line in capsys.readouterr().out
    assert load_run(run, CPU).end_token == token


def test_harmless_extras(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    tensors = write_llama(folder, tie_word_embeddings=True)
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    save_file(tensors | extras, folder / SINGLE)
    assert saved_tensors(imported(folder)).keys() == packed(tensors).keys()


def test_links_to_files_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    tensors = write_llama(tmp_path / "blobs", n_files=2)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    run = imported(tmp_path / "snapshot")
    assert saved_tensors(run).keys() == packed(tensors).keys()
    assert not (run / "tokenizer.json").is_symlink()


def change_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG | fields))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)

    return rewrite


def change_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        save_sharded(load_file(folder / SINGLE), folder, 2)
        (folder / SINGLE).unlink()
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return rewrite


def cut(folder: Path) -> None:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1)


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def without_index(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model-00001-of-00002.safetensors")


def pipe(folder: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


def two_tensors(folder: Path) -> None:
    save_file({NORM: torch.ones(32), EMBEDDING: torch.ones(280, 32)}, folder / SINGLE)


def no_index_json(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text("{")


def swap_files(weight_map: dict[str, str]) -> None:
    assert weight_map[NORM] != weight_map[EMBEDDING]
    weight_map[NORM], weight_map[EMBEDDING] = weight_map[EMBEDDING], weight_map[NORM]


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
FIRST = "model-00001-of-00002.safetensors"
DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    # config.json
    "no config": (remove("config.json"), "llama has no config.json; give the folder of a Llama"),
    "no JSON": (write("config.json", "{"), "config.json: .*restore the config.json of the model"),
    "deep JSON": (write("config.json", 100_000 * "["), "config.json: .*recursion limit"),
    "a list": (write("config.json", "[]"), "config.json: .*should be an object"),
    "another architecture": (
        write("config.json", '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}'),
        r'config.json describes \["GPT2LMHeadModel"\], and only LlamaForCausalLM can be imported',
    ),
    "missing field": (
        write("config.json", '{"architectures": ["LlamaForCausalLM"]}'),
        "config.json: vocab_size: field required; restore",
    ),
    "many layers": (
        change_config(num_hidden_layers=10**15),
        r"num_hidden_layers = 1000000000000000, and the weights of .* are only 21 tensors",
    ),
    # Weights
    "no weights": (remove(SINGLE), "has no weights: neither model.safetensors nor .*index.json"),
    "pickled": (pickled, r"only pickled weights, such as pytorch_model.bin.*save_pretrained"),
    "no index": (without_index, f"has {FIRST}, and neither model.safetensors nor model.safet"),
    "cut": (cut, "model.safetensors is damaged or no safetensors file"),
    "empty": (write(SINGLE, b""), "model.safetensors is damaged or no safetensors file"),
    "large header": (
        write(SINGLE, (2**40).to_bytes(8, "little") + b"{}"),
        r"model.safetensors is damaged or no safetensors file \(.*header too large",
    ),
    "pipe": (pipe, "model.safetensors is not a regular file"),
    "missing tensor": (change_tensors(lambda found: found.pop(DOWN)), f"lack {DOWN} of the model"),
    "most tensors missing": (
        two_tensors,
        r"lack model.layers.0.input_layernorm.weight, .*q_proj.weight, .*k_proj.weight and 16 more",
    ),
    "bias": (
        change_tensors(
            lambda found: found.update(
                {f"model.layers.{n}.self_attn.q_proj.bias": torch.ones(32) for n in range(2)}
            )
        ),
        r"have model.layers.0.self_attn.q_proj.bias, model.layers.1.*q_proj.bias, not part of the",
    ),
    "other shape": (
        change_tensors(lambda found: found.update({DOWN: torch.ones(32, 81)})),
        rf"has {DOWN} with the shape \[32, 81\], and config.json describes \[32, 80\]",
    ),
    "integers": (
        change_tensors(lambda found: found.update({DOWN: torch.ones(32, 80, dtype=torch.int8)})),
        f"has {DOWN} as I8, and only F32, BF16, F16 can be imported",
    ),
    "64-bit floats": (
        change_tensors(lambda found: found.update({DOWN: found[DOWN].double()})),
        f"has {DOWN} as F64, and only .* imported; save the model as float32 with transformers",
    ),
    "8-bit floats": (
        change_tensors(lambda found: found.update({DOWN: found[DOWN].to(torch.float8_e4m3fn)})),
        f"has {DOWN} as F8_E4M3, and only .* not quantised",
    ),
    "not a number": (
        change_tensors(lambda found: found[NORM].__setitem__(3, torch.nan)),
        f"has {NORM} with values that are not finite",
    ),
    "infinite": (
        change_tensors(lambda found: found[DOWN].__setitem__((3, 3), torch.inf)),
        f"has {DOWN} with values that are not finite",
    ),
    "untied": (
        change_config(tie_word_embeddings=True),
        "has a lm_head.weight that is not model.embed_tokens.weight.*set it to false",
    ),
    # The index
    "index is no JSON": (
        no_index_json,
        "index.json: .*; download it again",
    ),
    "index without tensors": (change_index(dict.clear), "num_hidden_layers = 2.* only 0 tensors"),
    "index out of the folder": (
        change_index(lambda names: names.update({NORM: "../model.safetensors"})),
        r"names '../model.safetensors', which is not the name of a file in this folder",
    ),
    "index with an absolute path": (
        change_index(lambda names: names.update({NORM: "/etc/passwd"})),
        r"names '/etc/passwd', which is not the name of a file in this folder",
    ),
    "index with a missing file": (
        change_index(lambda names: names.update({NORM: "model-3.safetensors"})),
        "names model-3.safetensors, and there is no such file; download it",
    ),
    "index with tensors elsewhere": (
        change_index(swap_files),
        rf"-of-00002.safetensors lacks ({NORM}|{EMBEDDING}), which .*index.json has there",
    ),
    "index without a tensor": (
        change_index(lambda names: names.pop(EMBEDDING)),
        rf"-of-00002.safetensors has {EMBEDDING}, which .*index.json does not have there",
    ),
    # The tokenizer
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer.json; download that of the model"),
    "sentencepiece": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model") and None,
        r"has tokenizer.model and no tokenizer.json.*AutoTokenizer.from_pretrained\('.*llama'\)",
    ),
    "sentencepiece model that is a pipe": (
        lambda folder: os.mkfifo(folder / "tokenizer.model"),
        "tokenizer.model is not a regular file; restore it, or remove it",
    ),
    "damaged tokenizer": (write("tokenizer.json", "{}"), "tokenizer.json is not a tokenizer"),
    "large tokenizer": (
        change_config(vocab_size=200),
        r"tokenizer.json has 2\d\d token ids and the model 200; take the tokenizer of the model",
    ),
    "end token that is none": (
        change_config(eos_token_id=275),
        "config.json has eos_token_id = 275, which is no token of .*tokenizer.json; set it",
    ),
    "negative end token": (
        change_config(eos_token_id=[-1]),
        "eos_token_id = -1, which is no token",
    ),
    "large end token": (
        change_config(eos_token_id=2**70),
        "eos_token_id = 1180591620717411303424, which is no",
    ),
    "no end token": (change_config(eos_token_id=None), "config.json has no eos_token_id; set it"),
    "no end tokens": (change_config(eos_token_id=[]), "config.json has no eos_token_id; set it"),
    "damaged generation_config": (
        write("generation_config.json", '{"eos_token_id": "</s>"}'),
        "generation_config.json: eos_token_id.*; restore it, or remove it",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGED[name]
    folder = tmp_path / "llama"
    write_llama(folder)
    damage(folder)
    line = refusal(capsys, "import", folder, "--output", tmp_path / "new" / "run")
    assert re.search(message, line), line
    assert str(folder) in line
    assert os.listdir(tmp_path) == ["llama"]


def test_large_sentencepiece_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(typed_json, "MAX_BYTES", 1000)
    write_llama(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").write_bytes(bytes(1001))
    line = refusal(capsys, "import", tmp_path / "llama", "--output", tmp_path / "run")
    assert "tokenizer.model is larger than 1000 bytes; restore it, or remove it" in line
    assert os.listdir(tmp_path) == ["llama"]


FIELDS: dict[str, tuple[Any, str]] = {
    "architectures": (["LlamaForSequenceClassification"], "only LlamaForCausalLM can be imported"),
    "model_type": ("mistral", 'describes "mistral", and only LlamaForCausalLM can be imported'),
    "auto_map": ({"AutoModel": "code.Model"}, "names code of its own"),
    "hidden_act": ("gelu", 'hidden_act = "gelu", and fastllama\'s model computes only .*"silu"'),
    "attention_bias": (True, "attention_bias = true, and .*only attention_bias = false"),
    "mlp_bias": (True, "mlp_bias = true, and .*only mlp_bias = false"),
    "sliding_window": (4096, "sliding_window = 4096, and .*only sliding_window = null"),
    "partial_rotary_factor": (0.5, "partial_rotary_factor = 0.5, and .*only"),
    "quantization_config": ({"quant_method": "gptq"}, r"quantization_config = \{.*gptq"),
    "vocab_size": ("280", "vocab_size: input should be a valid integer"),
    "hidden_size": (True, "hidden_size: input should be a valid integer"),
    "intermediate_size": (0, "model.ffn_hidden must be at least 1, not 0"),
    "num_hidden_layers": (0, "model.n_layers must be at least 1, not 0"),
    "num_attention_heads": (3, "model.n_heads = 3 does not divide model.n_embd = 32"),
    "num_key_value_heads": (3, "model.n_kv_heads = 3 does not divide model.n_heads = 4"),
    "head_dim": (7, "model.head_dim = 7 is odd"),
    "max_position_embeddings": (2**62, "max_position_embeddings = 4611686018427387904, more than"),
    "rms_norm_eps": (float("nan"), "model.eps must be greater than 0, not nan"),
    "tie_word_embeddings": ("no", "tie_word_embeddings: input should be a valid boolean"),
    "rope_theta": (float("inf"), "model.theta must be greater than 0 and finite, not inf"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, 'rotary embeddings of type "linear"'),
    "rope_parameters": ({"rope_type": "yarn"}, 'rotary embeddings of type "yarn"'),
    "rope_scaling.factor": (LLAMA_3_SCALING | {"factor": None}, "llama3 without all of factor"),
    "rope_scaling.low": (
        LLAMA_3_SCALING | {"low_freq_factor": 4.0},
        "model.rope_low_freq_factor = 4.0 must be less than",
    ),
    "rope_parameters.partial": (
        {"rope_type": "default", "partial_rotary_factor": 0.25},
        "partial_rotary_factor = 0.25, and fastllama's model rotates whole heads",
    ),
    "eos_token_id": ("</s>", "eos_token_id.*: input should be a valid integer"),
}


def test_every_field_that_is_read_is_in_the_table() -> None:
    read = [*dataclasses.fields(ArchitectureJson), *dataclasses.fields(LlamaJson)]
    assert {name.partition(".")[0] for name in FIELDS} == {field.name for field in read}


@pytest.mark.parametrize("field", FIELDS)
def test_field_that_is_refused(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, message = FIELDS[field]
    folder = tmp_path / "llama"
    write_llama(folder)
    change_config(**{field.partition(".")[0]: value})(folder)
    line = refusal(capsys, "import", folder, "--output", tmp_path / "run")
    assert re.search(f"^error: {folder}/config.json.*({message})", line), line
    assert os.listdir(tmp_path) == ["llama"]


def test_several_start_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "llama")
    put_before_texts(tmp_path / "llama", template="<SOS> <SOS> $A")
    line = refusal(capsys, "import", tmp_path / "llama", "--output", tmp_path / "run")
    assert "tokenizer.json puts 2 tokens before a text, and fastllama one at most; remove" in line
    assert os.listdir(tmp_path) == ["llama"]


def test_start_token_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "llama")
    put_before_texts(tmp_path / "llama", 999)
    line = refusal(capsys, "import", tmp_path / "llama", "--output", tmp_path / "run")
    assert "tokenizer.json puts token 999 before a text and has no such token" in line
    assert os.listdir(tmp_path) == ["llama"]


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "llama")
    run, output = imported(tmp_path / "llama"), tmp_path / "other"

    def refused(folder: str | Path) -> str:
        return refusal(capsys, "import", folder, "--output", output)

    name = "meta-llama/Llama-3.2-1B"
    assert f"hf download {name} --local-dir DIR, and import DIR" in refused(name)
    assert "There is no folder" in refused(tmp_path / "gone")
    assert "config.json is not a folder" in refused(tmp_path / "llama" / "config.json")
    for path in (run, run / CHECKPOINT, run / "checkpoints" / "latest"):
        assert "is a run folder of fastllama, or in one, and needs no import" in refused(path)
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json" in refused(tmp_path / "empty")
    assert not output.exists()


def test_output_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "llama")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        line = refusal(capsys, "import", tmp_path / "llama", "--output", tmp_path / name)
        assert f"{name} exists: choose another --output" in line
    line = refusal(capsys, "import", tmp_path / "llama", "--output", tmp_path / "file" / "run")
    assert "file is not a writable folder: choose another --output" in line
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "folder", "file", "link"}


def test_killed_import_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama")
    left = tmp_path / ".run.partial" / "checkpoints" / ".step-00000000.partial"
    left.mkdir(parents=True)
    (left / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    run = imported(tmp_path / "llama")
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "run"}
    assert set(os.listdir(run / "checkpoints")) == {"latest", CHECKPOINT.name}


def test_second_import_at_the_same_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "llama")
    with RunFolder(tmp_path / ".run.partial").locked():
        line = refusal(capsys, "import", tmp_path / "llama", "--output", tmp_path / "run")
    assert "another process is writing into" in line
    (tmp_path / ".run.partial").touch()
    line = refusal(capsys, "import", tmp_path / "llama", "--output", tmp_path / "run")
    assert ".run.partial is not a folder, or is inside a file; choose another --output." in line
    (tmp_path / ".run.partial").unlink()
    assert os.listdir(tmp_path) == ["llama"]


# Prints by how much the memory of an import exceeds that before it, in bytes.
PEAK = """
import sys
from pathlib import Path
from fastllama.weights.importing import import_run

def memory(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

import_run(Path(sys.argv[1]), Path(sys.argv[2]))
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
import_run(Path(sys.argv[3]), Path(sys.argv[4]))
print(memory("VmHWM") - before)
"""


def test_memory_is_bounded_by_a_few_tensors(tmp_path: Path) -> None:
    write_llama(tmp_path / "small")
    write_llama(tmp_path / "large", torch.bfloat16, 2, num_hidden_layers=40, hidden_size=512)
    paths = [tmp_path / name for name in ("small", "small run", "large", "large run")]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, paths)], capture_output=True, text=True, check=True
    )
    size = sum(path.stat().st_size for path in (paths[3] / CHECKPOINT).iterdir())
    assert size > 2**27
    # The largest tensor has 3 MiB. It is joined from three of the source; the allocator keeps some.
    assert int(done.stdout) < 16 * 2**20
