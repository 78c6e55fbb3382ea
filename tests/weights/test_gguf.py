"""`fastllama export --gguf`: the file is computed as llama.cpp does, in float64; its tokenizer."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split
from torch import Tensor

from fastllama.cli import main
from fastllama.data.tokenizer import load_tokenizer
from fastllama.inference.load import load_run
from fastllama.weights.gguf import LLAMA_3_WORDS, export_gguf
from fastllama.weights.source import Source
from tests.cli.refusal import refusal
from tests.weights.llama_folder import SINGLE, put_before_texts, write_llama
from tests.weights.test_export import ALL_SHAPES, exported_tensors, tokens_of

CPU = torch.device("cpu")


def needs_gguf(test: Any) -> Any:
    is_missing = find_spec("gguf") is None
    skipped = pytest.mark.skipif(is_missing, reason="no gguf: make test-all installs it")
    return pytest.mark.extra(skipped(test))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of the small Llama, with more ids than its tokenizer has."""
    write_llama(tmp_path / "llama")
    main(["import", str(tmp_path / "llama"), "--output", str(tmp_path / "run")])
    return tmp_path / "run"


def change_tokenizer(run: Path, change: Callable[[Tokenizer], Any]) -> None:
    path = run / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    change(tokenizer)
    tokenizer.save(str(path))


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file; bfloat16 becomes float32."""
    gguf = import_module("gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found = {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return fields, found


def logits_of_gguf(path: Path, tokens_BT: Tensor) -> Tensor:
    """Logits (B, T, V) in float64, of nothing but the file, as llama.cpp computes a `llama`."""
    fields, found = read_gguf(path)
    weights = {name: tensor.double() for name, tensor in found.items()}
    assert fields["general.architecture"] == "llama"
    options = {name[6:]: value for name, value in fields.items() if name.startswith("llama.")}
    n_heads, n_kv_heads = options["attention.head_count"], options["attention.head_count_kv"]
    width = options["attention.key_length"]
    assert options["rope.dimension_count"] == options["attention.value_length"] == width
    positions = torch.arange(tokens_BT.shape[1], dtype=torch.float64)
    frequencies = options["rope.freq_base"] ** -(torch.arange(0, width, 2).double() / width)
    frequencies /= weights.get("rope_freqs.weight", torch.ones(()))
    rotation_TR = torch.polar(torch.ones(()).double(), torch.outer(positions, frequencies))

    def norm(x: Tensor, name: str) -> Tensor:
        mean = x.square().mean(-1, keepdim=True)
        return x * (mean + options["attention.layer_norm_rms_epsilon"]).rsqrt() * weights[name]

    def heads(x: Tensor, name: str, n: int) -> Tensor:
        return (x @ weights[name].T).unflatten(-1, (n, width)).transpose(1, 2)

    def rotated(x_BHTK: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x_BHTK.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotation_TR).flatten(-2)

    x = weights["token_embd.weight"][tokens_BT]
    for layer in range(options["block_count"]):
        prefix = f"blk.{layer}"
        h = norm(x, f"{prefix}.attn_norm.weight")
        out = torch.nn.functional.scaled_dot_product_attention(
            rotated(heads(h, f"{prefix}.attn_q.weight", n_heads)),
            rotated(heads(h, f"{prefix}.attn_k.weight", n_kv_heads)),
            heads(h, f"{prefix}.attn_v.weight", n_kv_heads),
            is_causal=True,
            enable_gqa=True,
        )
        x = x + out.transpose(1, 2).flatten(2) @ weights[f"{prefix}.attn_output.weight"].T
        h = norm(x, f"{prefix}.ffn_norm.weight")
        gate, up = (h @ weights[f"{prefix}.ffn_{name}.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[f"{prefix}.ffn_down.weight"].T
    output = weights.get("output.weight", weights["token_embd.weight"])
    return norm(x, "output_norm.weight") @ output.T


@needs_gguf
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_logits_are_those_of_fastllama(shape: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "llama", **ALL_SHAPES[shape])
    run, output = tmp_path / "run", tmp_path / "model.gguf"
    main(["import", str(tmp_path / "llama"), "--output", str(run)])
    main(["export", str(run), "--output", str(output), "--gguf", "--dtype", "float32"])
    model = load_run(run, CPU).model
    tokens = tokens_of(model.config)
    expected = logits_of_gguf(output, tokens)
    # Logits near 1, of sums of a few hundred products that float32 rounds to 6e-8 each.
    assert 0.5 < expected.std() < 2
    torch.testing.assert_close(model(tokens).double(), expected, rtol=0, atol=2e-5)
    fields, _ = read_gguf(output)
    assert fields["llama.context_length"] == model.config.max_seq_len
    assert fields["llama.vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == 280


@needs_gguf
def test_matrices_are_those_of_the_folder(run: Path, tmp_path: Path) -> None:
    main(["export", str(run), "--output", str(tmp_path / "folder")])
    main(["export", str(run), "--output", str(tmp_path / "model.gguf"), "--gguf"])
    _, found = read_gguf(tmp_path / "model.gguf")
    folder, exact = exported_tensors(tmp_path / "folder"), load_file(tmp_path / "llama" / SINGLE)
    parts = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    parts |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    for layer in range(2):
        for theirs, name in parts.items():
            expected = folder[f"model.layers.{layer}.{theirs}.weight"]
            assert torch.equal(found[f"blk.{layer}.{name}.weight"], expected.float())
        # Rows of both halves of a head take turns.
        for name, n_heads in (("q", 4), ("k", 2)):
            rows = found[f"blk.{layer}.attn_{name}.weight"].unflatten(0, (n_heads, -1))
            halves = torch.cat([rows[:, 0::2], rows[:, 1::2]], 1).flatten(0, 1)
            expected = folder[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
            assert torch.equal(halves, expected.float())
        # llama.cpp multiplies by float32 only.
        norm = found[f"blk.{layer}.attn_norm.weight"]
        assert torch.equal(norm, exact[f"model.layers.{layer}.input_layernorm.weight"])
    assert torch.equal(found["token_embd.weight"], folder["model.embed_tokens.weight"].float())
    assert torch.equal(found["output.weight"], folder["lm_head.weight"].float())


def split(pattern: str) -> Sequence:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(False, use_regex=False)])


PRE_TOKENIZERS: dict[str, Any] = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": split(LLAMA_3_WORDS),
}


@needs_gguf
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_tokenizer(name: str, run: Path, tmp_path: Path) -> None:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
        tokenizer.model.ignore_merges = name == "llama-bpe"
        tokenizer.add_tokens([AddedToken("self return", special=False)])

    change_tokenizer(run, change)
    main(["export", str(run), "--output", str(tmp_path / "model.gguf"), "--gguf"])
    fields, _ = read_gguf(tmp_path / "model.gguf")
    own = {key[15:]: value for key, value in fields.items() if key.startswith("tokenizer.ggml.")}
    assert (own["model"], own["pre"]) == ("gpt2", name)
    assert (own["bos_token_id"], own["eos_token_id"]) == (1, 1)
    assert (own["add_bos_token"], own["add_eos_token"]) == (False, False)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    n = tokenizer.get_vocab_size()
    for number in range(n):
        assert own["tokens"][number] == tokenizer.id_to_token(number)
    assert own["tokens"][n:] == [f"[PAD{number}]" for number in range(n, 280)]
    # Control, normal, user-defined, unused.
    assert own["token_type"] == [3] * 4 + [1] * (n - 5) + [4] + [5] * (280 - n)
    # A tokenizer of nothing but the file.
    vocabulary = {text: number for number, text in enumerate(own["tokens"])}
    rebuilt = Tokenizer(
        models.BPE(vocabulary, [(*merge.split(" "),) for merge in own["merges"]])  # type: ignore[misc]
    )
    rebuilt.pre_tokenizer = PRE_TOKENIZERS[name]
    rebuilt.decoder = decoders.ByteLevel()
    for text in ("def self  returned 1234\n\t x", "naïve 日本語 🙂\r\n"):
        assert rebuilt.encode(text).ids == tokenizer.encode(text).ids
        assert rebuilt.decode(rebuilt.encode(text).ids) == text


@needs_gguf
def test_start_token(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run)
    put_before_texts(tmp_path / "llama")
    main(["import", str(tmp_path / "llama"), "--output", str(run)])
    main(["export", str(run), "--output", str(tmp_path / "model.gguf"), "--gguf"])
    fields, _ = read_gguf(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is True


def without_merges(tokenizer: Tokenizer) -> None:
    tokenizer.model = models.BPE(tokenizer.get_vocab(), [])


def without_a_byte(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop("A")
    tokenizer.model = models.BPE(vocabulary, [(*pair,) for pair in content["model"]["merges"]])


REFUSED: dict[str, tuple[Callable[[Tokenizer], Any], str]] = {
    "unigram": (
        lambda tokenizer: setattr(tokenizer, "model", models.Unigram([("<SOS>", 0.0)] * 4, 0)),
        "its model is Unigram, not byte-level BPE",
    ),
    "spaces as in Llama 2": (
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", Metaspace()),
        "its pre-tokenizer is none of ByteLevel, Digits with ByteLevel, and that of Llama 3",
    ),
    "prefix space": (
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", ByteLevel(True)),
        "its pre-tokenizer is none of",
    ),
    "another pattern": (
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", split(r"\w+")),
        "its pre-tokenizer is none of",
    ),
    "normalizer": (
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.NFC()),
        "it changes text by a normalizer, NFC",
    ),
    "merges": (without_merges, "it has no merges"),
    "bytes": (without_a_byte, "its vocabulary lacks bytes"),
    "ignore_merges": (
        lambda tokenizer: setattr(tokenizer.model, "ignore_merges", True),
        "its ignore_merges is True",
    ),
    "stripping": (
        lambda tokenizer: tokenizer.add_tokens([AddedToken("<X>", lstrip=True, special=False)]),
        "its token '<X>' takes spaces or words around it",
    ),
}


@needs_gguf
@pytest.mark.parametrize("case", REFUSED)
def test_tokenizers_that_llama_cpp_has_not(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = REFUSED[case]
    change_tokenizer(run, change)
    line = refusal(capsys, "export", run, "--output", tmp_path / "model.gguf", "--gguf")
    assert f"llama.cpp cannot encode text as {run / 'tokenizer.json'} does: {reason}" in line
    assert line.endswith("; export without --gguf.\n")
    assert set(os.listdir(tmp_path)) == {"llama", "run"}


@needs_gguf
def test_failed_write_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Source.read

    def fail_in_the_middle(self: Source, names: Iterable[str]) -> Iterator[Tensor]:
        yield next(original(self, names))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Source, "read", fail_in_the_middle)
    with pytest.raises(OSError, match="No space left on device") as error:
        export_gguf(run, tmp_path / "models" / "model.gguf")
    assert Path(error.value.filename) == tmp_path / "models" / "model.gguf"
    assert set(os.listdir(tmp_path)) == {"llama", "run"}


def test_without_the_library(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python raises ModuleNotFoundError for such an entry.
    monkeypatch.setitem(sys.modules, "gguf", None)
    line = refusal(capsys, "export", run, "--output", tmp_path / "model.gguf", "--gguf")
    assert line == (
        "error: --gguf needs the library gguf, which is not installed; install it with "
        "pip install 'fastllama[gguf]'.\n"
    )
    assert set(os.listdir(tmp_path)) == {"llama", "run"}
