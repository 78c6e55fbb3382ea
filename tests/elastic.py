"""Resumes one training on other numbers of ranks and replicas and with other micro-batches.

    python -m tests.elastic

Prints as JSON:
    uninterrupted   the losses of one rank
    resumed         the losses of a run that resumes on each layout in turn
    elements        the number of elements in a checkpoint
    layouts         for each layout, whether it loads and saves every bit of another layout's
                    checkpoint, and how many elements its own shards hold
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.ranks import forked, launch  # first, because it sets PyTorch's number of threads

# isort: split
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

import fastllama.train
from fastllama.checkpoints.reading import load_tensors
from tests.workspace import make_workspace

LAYOUTS = {
    "2 ranks": (2, 2, 1),
    "1 rank, micro-batches of 4": (1, 4, 1),
    "4 ranks, 2 replicas, micro-batches of 1": (4, 1, 2),
    "4 ranks": (4, 2, 1),
    "2 ranks, 2 replicas": (2, 2, 2),
}
"""Ranks, sequences in a micro-batch, and replicas."""
UPDATES_PER_LAYOUT = 3
# The schedule must not depend on the length of the run.
OPTIONS = ("--optimizer.schedule", "constant", "--logging.sample-interval", "0")
OPTIONS += ("--optimizer.warmup-iterations", "1", "--training.eval-interval", "0")


def train(folder: Path, run: Path, n_updates: int, layout: str, skip: bool = False) -> None:
    """Start or resume `run` on a layout, up to update `n_updates`; if `skip`, skip all of them."""
    world_size, batch_size, replicate = LAYOUTS[layout]
    start = ["--resume", run] if run.exists() else [folder / "tiny.toml", "--run-dir", run]
    shape = ["--training.batch-size", str(batch_size), "--parallel.replicate", str(replicate)]
    outcome = launch(
        world_size,
        ["train", *start, *OPTIONS, *shape, "--training.training-tokens", str(n_updates * 256)],
        run.with_suffix(".log"),
        prepare=(lambda rank: skip_updates()) if skip else lambda rank: None,
    )
    if set(outcome.codes) != {0}:
        raise RuntimeError(outcome.printed)


def skip_updates() -> None:
    """Make every loss NaN, so that the run saves exactly what it loaded."""
    original = fastllama.train.update

    def update(optimizer: Any, loss: Tensor, *rest: Any) -> Any:
        return original(optimizer, loss * float("nan"), *rest)

    fastllama.train.update = update


def newest_tensors(run: Path) -> dict[str, Tensor]:
    """The full tensors of the newest checkpoint, loaded without its model."""
    path = (run / "checkpoints" / "latest").resolve()
    shapes = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(shape.size) for name, shape in shapes.items()}  # type: ignore[union-attr]
    load_tensors(path, tensors)
    return tensors


def saved_elements(run: Path) -> int:
    """Elements in all shards of the newest checkpoint; an element saved twice counts twice."""
    shards = (run / "checkpoints" / "latest").glob("*.safetensors")
    return sum(tensor.numel() for shard in shards for tensor in load_file(shard).values())


def losses(run: Path) -> list[float]:
    rows = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forked(lambda: make_workspace(folder))
        uninterrupted, resumed = folder / "uninterrupted", folder / "resumed"
        n_updates = UPDATES_PER_LAYOUT * len(LAYOUTS)
        train(folder, uninterrupted, n_updates, "1 rank, micro-batches of 4")
        for number, layout in enumerate(LAYOUTS, start=1):
            train(folder, resumed, UPDATES_PER_LAYOUT * number, layout)
        run = folder / "skipped"
        train(folder, run, UPDATES_PER_LAYOUT, "2 ranks")
        first = newest_tensors(run)
        layouts = {}
        for number, layout in enumerate(LAYOUTS, start=1):
            train(folder, run, UPDATES_PER_LAYOUT + number, layout, skip=True)
            tensors = newest_tensors(run)
            same = all(torch.equal(tensor, tensors[key]) for key, tensor in first.items())
            layouts[layout] = {
                "same": same and len(tensors) == len(first),
                "elements": saved_elements(run),
            }
        results = {
            "uninterrupted": losses(uninterrupted),
            "resumed": losses(resumed),
            "elements": sum(tensor.numel() for tensor in first.values()),
            "layouts": layouts,
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
