"""One training that goes on with other numbers of ranks, replicas and micro-batches.

    python -m tests.elastic

Prints as JSON the losses of a training of one rank that was never stopped, those of one that went
on over every layout in turn, and, for each layout, whether it loads and saves every bit that
another saved and how many elements its shards hold.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.ranks import forked, launch  # first: it sets the threads of PyTorch

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
UPDATES_A_LAYOUT = 3
# A schedule that does not depend on the end of the run.
OPTIONS = ("--optimizer.schedule", "constant", "--logging.sample-interval", "0")
OPTIONS += ("--optimizer.warmup-iterations", "1", "--training.eval-interval", "0")


def train(folder: Path, run: Path, updates: int, layout: str, poison: bool = False) -> None:
    """Go on with `run` over a layout until that many updates are done; refuse them if poisoned."""
    world_size, batch_size, replicate = LAYOUTS[layout]
    start = ["--resume", run] if run.exists() else [folder / "tiny.toml", "--run-dir", run]
    shape = ["--training.batch-size", str(batch_size), "--parallel.replicate", str(replicate)]
    outcome = launch(
        world_size,
        ["train", *start, *OPTIONS, *shape, "--training.training-tokens", str(updates * 256)],
        run.with_suffix(".log"),
        prepare=(lambda rank: refuse_updates()) if poison else lambda rank: None,
    )
    if set(outcome.codes) != {0}:
        raise RuntimeError(outcome.printed)


def refuse_updates() -> None:
    """Have every update refused, so that what was loaded is what is saved."""
    original = fastllama.train.update

    def update(optimizer: Any, loss: Tensor, *rest: Any) -> Any:
        return original(optimizer, loss * float("nan"), *rest)

    fastllama.train.update = update


def newest_tensors(run: Path) -> dict[str, Tensor]:
    """The last checkpoint put together, as another tool would."""
    path = (run / "checkpoints" / "latest").resolve()
    shapes = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(shape.size) for name, shape in shapes.items()}  # type: ignore[union-attr]
    load_tensors(path, tensors)
    return tensors


def saved_elements(run: Path) -> int:
    """Elements in all shards of the last checkpoint, those saved twice counted twice."""
    shards = (run / "checkpoints" / "latest").glob("*.safetensors")
    return sum(tensor.numel() for shard in shards for tensor in load_file(shard).values())


def losses(run: Path) -> list[float]:
    rows = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forked(lambda: make_workspace(folder))
        straight, changing, refused = folder / "straight", folder / "changing", folder / "refused"
        n_updates = UPDATES_A_LAYOUT * len(LAYOUTS)
        train(folder, straight, n_updates, "1 rank, micro-batches of 4")
        for number, layout in enumerate(LAYOUTS, start=1):
            train(folder, changing, UPDATES_A_LAYOUT * number, layout)
        train(folder, refused, UPDATES_A_LAYOUT, "2 ranks")
        first = newest_tensors(refused)
        found: dict[str, Any] = {"straight": losses(straight), "changing": losses(changing)}
        found["elements"] = sum(tensor.numel() for tensor in first.values())
        found["layouts"] = {}
        for number, layout in enumerate(LAYOUTS, start=1):
            train(folder, refused, UPDATES_A_LAYOUT + number, layout, poison=True)
            tensors = newest_tensors(refused)
            same = all(torch.equal(tensor, tensors[key]) for key, tensor in first.items())
            found["layouts"][layout] = {
                "same": same and len(tensors) == len(first),
                "elements": saved_elements(refused),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
