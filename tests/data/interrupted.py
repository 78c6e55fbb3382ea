"""Makes data folders whose preparation was interrupted."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastllama.data.prepare as module
from fastllama.data.manifest import Manifest
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer

SHARD_TOKENS = 50


@dataclass(frozen=True)
class Preparation:
    """Inputs of `prepare`, and the folder it writes."""

    corpus: Path
    tokenizer: Path
    output: Path

    def run(self, output: Path | None = None, *, shard_tokens: int = SHARD_TOKENS) -> Manifest:
        """Prepare the data, or resume."""
        return module.prepare(
            [str(self.corpus)],
            self.tokenizer,
            output or self.output,
            validation_fraction=0.3,
            shard_tokens=shard_tokens,
        )

    def interrupt(self, commits: int = 3) -> None:
        """Prepare until progress is recorded `commits` times, then fail half-way to the next."""
        commit, append = module._commit, module.SplitWriter.append
        n_commits = 0

        def count(*arguments: object) -> None:
            nonlocal n_commits
            commit(*arguments)  # type: ignore[arg-type]
            n_commits += 1

        def fail(writer: module.SplitWriter, tokens: object) -> None:
            append(writer, tokens)  # type: ignore[arg-type]
            if n_commits >= commits:
                raise OSError("no space left on the device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "COMMIT_SECONDS", 0)
            patch.setattr(module, "BATCH_RECORDS", 10)
            patch.setattr(module, "_commit", count)
            patch.setattr(module.SplitWriter, "append", fail)
            with pytest.raises(OSError, match="no space"):
                self.run()


def make_preparation(folder: Path) -> Preparation:
    """Write a corpus of 60 documents and its tokenizer. Nothing is prepared yet."""
    texts = [f"document number {number}: " + "ab " * (number % 7) for number in range(60)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    save_tokenizer(train_tokenizer(texts, 300), folder / "tokenizer.json")
    return Preparation(corpus, folder / "tokenizer.json", folder / "data")


def contents(folder: Path) -> dict[str, bytes | str]:
    """Names of everything below `folder`: the bytes of files, the targets of links."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }
