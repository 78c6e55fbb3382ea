"""Variants of a tokenizer, made by changing its JSON, and what its JSON tells about it."""

import json
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from fastllama.printable import one_line

# No text holds it: Unicode keeps this code point free of characters.
UNREACHABLE = "\ufdd0"


def description(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as the content of its `tokenizer.json`."""
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def is_byte_level(content: dict[str, Any]) -> bool:
    """Whether the vocabulary spells bytes, each as one visible character."""
    parts = [*steps(content["normalizer"]), *steps(content["pre_tokenizer"])]
    return any(part["type"] == "ByteLevel" for part in parts)


def missing_bytes(content: dict[str, Any]) -> list[str]:
    """The symbols of the bytes that a byte-level vocabulary lacks, sorted."""
    return sorted(set(ByteLevel.alphabet()) - set(content["model"]["vocab"]))


def is_lossless(content: dict[str, Any]) -> bool:
    """Whether decoding provably returns every text, up to a space at its beginning.

    This holds for a byte-level BPE with all 256 bytes whose other parts only split.
    """
    model = content["model"]
    *before, last = steps(content["pre_tokenizer"]) or [{"type": None}]
    return (
        model["type"] == "BPE"
        and not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
        and content["normalizer"] is None
        and last["type"] == "ByteLevel"
        and all(
            part["type"] == "Digits" or part.get("behavior", "Removed") != "Removed"
            for part in before
        )
        and all(token["special"] for token in content["added_tokens"])
        and not missing_bytes(content)
    )


def unknown_id(content: dict[str, Any]) -> int | None:
    """Id of the token that stands for text outside of the vocabulary."""
    model = content["model"]
    if model["type"] == "Unigram":
        identifier: int | None = model["unk_id"]
        return identifier
    name = model.get("unk_token")
    return model["vocab"].get(name)


def with_decoder(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the decoder that its pre-tokenizer implies, if it has none.

    Without a decoder, the tokenizers library joins the raw symbols with spaces.
    """
    if tokenizer.decoder is not None:
        return tokenizer
    content = description(tokenizer)
    content["decoder"] = _implied_decoder(content)
    return _rebuilt(content)


def continuing(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer for text that continues a document: it puts no space before it."""
    content = description(tokenizer)
    for part in steps(content["pre_tokenizer"]):
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
    kept = [part for part in steps(content["normalizer"]) if part["type"] != "Prepend"]
    content["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    return _rebuilt(content)


def without_token(tokenizer: Tokenizer, token_id: int) -> Tokenizer:
    """The tokenizer, unable to encode text as `token_id`; all other tokens keep their ids.

    The token of unknown text stays reachable.
    """
    content = description(tokenizer)
    model = content["model"]
    names = [token["content"] for token in content["added_tokens"] if token["id"] == token_id]
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] != token_id]
    if token_id == unknown_id(content):
        return _rebuilt(content)
    if model["type"] == "Unigram":
        names += [piece for piece, _ in model["vocab"][token_id : token_id + 1]]
        # The vocabulary may hold a name twice; with the score of the other entry, text that did not
        # encode to the token would encode differently.
        for entry in model["vocab"]:
            if entry[0] in names:
                entry[0] = UNREACHABLE
        return _rebuilt(content)
    names += [name for name, number in model["vocab"].items() if number == token_id]
    model["vocab"] = {
        UNREACHABLE if number == token_id else name: number
        for name, number in model["vocab"].items()
    }
    if "merges" in model:
        model["merges"] = [
            pair for pair in model["merges"] if not {*pair, "".join(pair)} & set(names)
        ]
    return _rebuilt(content)


def repaired(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a token for every byte that it lacks, after all its other ids.

    A byte-level vocabulary gets the missing symbols. The vocabulary of another BPE or Unigram model
    gets 256 tokens `<0x00>` to `<0xFF>`, into which unknown characters fall back. All other ids
    stay, and so does the encoding of text without unknown characters.

    Raises:
        ValueError: the tokenizer lacks nothing, or its kind has no tokens for bytes.
    """
    content = description(tokenizer)
    model, kind = content["model"], content["model"]["type"]
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    content["decoder"] = content["decoder"] or _implied_decoder(content)
    if kind == "BPE" and is_byte_level(content):
        lacking = missing_bytes(content)
        if not lacking and tokenizer.decoder is not None:
            raise ValueError("it needs no repair: it has a token for every byte")
        model["vocab"].update((symbol, size + n) for n, symbol in enumerate(lacking))
        return _rebuilt(content)
    if kind not in ("BPE", "Unigram"):
        raise ValueError(
            f"a {kind} model cannot fall back to bytes; train a tokenizer with "
            "`fastllama tokenizer train`"
        )
    present = model["vocab"] if kind == "BPE" else [piece for piece, _ in model["vocab"]]
    lacking = [name for name in (f"<0x{byte:02X}>" for byte in range(256)) if name not in present]
    if not lacking and model["byte_fallback"]:
        raise ValueError("it needs no repair: it has a token for every byte")
    if kind == "BPE":
        model["vocab"].update((name, size + n) for n, name in enumerate(lacking))
    elif size > len(model["vocab"]):
        raise ValueError(
            "the tokens for bytes would take the ids of its added tokens; train a tokenizer with "
            "`fastllama tokenizer train`"
        )
    else:
        # The score of the rarest piece, because the score of unknown text depends on it.
        rarest = min(score for _, score in model["vocab"])
        model["vocab"] += [[name, rarest] for name in lacking]
    model["byte_fallback"] = True
    parts = [{"type": "ByteFallback"}, *steps(content["decoder"])]
    content["decoder"] = {"type": "Sequence", "decoders": parts}
    return _rebuilt(content)


def steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, which may be a sequence of others."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    [inner] = [value for value in part.values() if isinstance(value, list)]
    return [step for each in inner for step in steps(each)]


def _implied_decoder(content: dict[str, Any]) -> dict[str, Any] | None:
    if is_byte_level(content):
        return {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
    metaspaces = [p for p in steps(content["pre_tokenizer"]) if p["type"] == "Metaspace"]
    return metaspaces[0] if metaspaces else None


def _rebuilt(content: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # The library raises nothing narrower.
        raise ValueError(
            f"the tokenizer contradicts itself ({one_line(error, 200)}): use another tokenizer"
        ) from None
    tokenizer.encode_special_tokens = True
    return tokenizer
