"""What `prepare` says about lost text, cut words, and splits that are too small to use."""

from collections.abc import Iterator

from fastllama.config import ModelConfig
from fastllama.data.manifest import Manifest
from fastllama.data.pieces import PIECE_CHARACTERS
from fastllama.data.text_loss import TextLoss

MORE_DOCUMENTS = "give the text as more documents, such as one per line of a .jsonl file"


def notices(
    manifest: Manifest, validation_fraction: float, *, of_part: bool = False
) -> Iterator[str]:
    """Yield a line for each defect of complete data, with the option that would change it.

    A part may lack a split: only all parts together need tokens.
    """
    if (loss := manifest.text_loss) is not None and loss.lost:
        yield f"{'warning' if loss.is_large else 'note'}: {lost_text(loss)}"
    if of_part:
        return
    documents = sum(split.documents for split in manifest.splits.values())
    if validation_fraction and "validation" not in manifest.splits:
        yield (
            f"warning: none of the documents ({documents:,}) was held out for validation: raise "
            f"--validation-fraction {validation_fraction}, or {MORE_DOCUMENTS}"
        )
    sequence = ModelConfig().max_seq_len
    for name, split in manifest.splits.items():
        if split.tokens <= sequence:
            is_fraction = name == "validation" and validation_fraction
            more = "raise --validation-fraction" if is_fraction else "prepare more text"
            yield (
                f"warning: the {name} split has {split.tokens:,} tokens, and a sequence of "
                f"{sequence:,} needs {sequence + 1:,}: {more}, or train with a smaller "
                "--model.max-seq-len"
            )


def lost_text(loss: TextLoss) -> str:
    """How much text the tokenizer cannot represent, and what helps."""
    return (
        f"the tokenizer cannot represent {loss}; if it lacks tokens for bytes, `fastllama "
        "tokenizer repair` adds them; if it drops spaces or other text, choose another one"
    )


def cut_words(cuts: int) -> str:
    """How often words were cut that are too long to be encoded in one piece."""
    return (
        f"note: words of more than {PIECE_CHARACTERS:,} characters were cut at {cuts:,} places; "
        "the token ids beside a cut may differ from those of the whole word"
    )


def all_held_out(documents: int, validation_fraction: float) -> str:
    """The error of a preparation whose training split is empty."""
    return (
        f"all documents ({documents:,}) were held out for validation, and none is left to train "
        f"on: lower --validation-fraction {validation_fraction}, or {MORE_DOCUMENTS}"
    )
