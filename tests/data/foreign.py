"""Tokenizers of other projects in miniature, for tests."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer
from tokenizers import decoders as d
from tokenizers import models as m
from tokenizers import normalizers as n
from tokenizers import pre_tokenizers as p
from tokenizers import trainers as t

SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = [
    "the cat sat on a mat, and saw 1234 dogs run far into green hills.",
    "def f(x):\n    return x + 1  # it's naïve\n\n",
    "今天天气很好、我们去公园散步。",
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(prefix_space: bool = False) -> Tokenizer:
    """As GPT-2."""
    return _bpe(p.ByteLevel(add_prefix_space=prefix_space), d.ByteLevel(), p.ByteLevel.alphabet())


def split_by_pattern() -> Tokenizer:
    """As Llama 3 and Qwen: a pattern splits, text is brought to NFC."""
    split = p.Split(Regex(LLAMA_3), "isolated")
    words = p.Sequence([split, p.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = _bpe(words, d.ByteLevel(), p.ByteLevel.alphabet())
    tokenizer.normalizer = n.NFC()
    return _reloaded(tokenizer)


def without_pre_tokenizer() -> Tokenizer:
    """As Llama 2: spaces become ▁, nothing splits, unknown characters fall back to bytes."""
    tokenizer = _bpe(p.Metaspace(), None, [])
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    tokenizer.decoder = d.Sequence(
        [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    )
    return _reloaded(tokenizer)


def unigram(vocab_size: int = 90) -> Tokenizer:
    """As T5: sentencepiece's Unigram with ▁ for spaces."""
    tokenizer = Tokenizer(m.Unigram())
    tokenizer.pre_tokenizer = p.Metaspace()
    tokenizer.decoder = d.Metaspace()
    trainer = t.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS[:2], "</s>"] * 5, trainer)
    return _reloaded(tokenizer)


def word_piece() -> Tokenizer:
    """As BERT: lower case, no accents, ## inside words."""
    tokenizer = Tokenizer(m.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = n.BertNormalizer()
    tokenizer.pre_tokenizer = p.BertPreTokenizer()
    tokenizer.decoder = d.WordPiece()
    trainer = t.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    return _reloaded(tokenizer)


def words(
    *vocabulary: str, unknown: str = "<unk>", special: Sequence[str] = ("</s>",)
) -> Tokenizer:
    """A word-level vocabulary over words between spaces."""
    names = dict.fromkeys(("<unk>", "<s>", "</s>", *vocabulary))
    tokenizer = Tokenizer(m.WordLevel({name: i for i, name in enumerate(names)}, unknown))
    tokenizer.pre_tokenizer = p.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return _reloaded(tokenizer)


ALL = {
    "byte level": byte_level,
    "prefix space": lambda: byte_level(prefix_space=True),
    "split by pattern": split_by_pattern,
    "without pre-tokenizer": without_pre_tokenizer,
    "unigram": unigram,
    "word piece": word_piece,
}


def _bpe(
    pre_tokenizer: p.PreTokenizer, decoder: d.Decoder | None, alphabet: list[str]
) -> Tokenizer:
    tokenizer = Tokenizer(m.BPE(unk_token=None if alphabet else "<unk>", fuse_unk=not alphabet))
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    trainer = t.BpeTrainer(
        vocab_size=len(alphabet) + 150,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    return _reloaded(tokenizer)


def _reloaded(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as `load_tokenizer` returns it."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    return tokenizer
