"""`fastllama data show`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from fastllama.cli.command import Command
from fastllama.cli.errors import UsageError
from fastllama.cli.parsing import parse
from fastllama.cli.streams import print_result, require_stdout


@dataclass(frozen=True)
class DataShowOptions:
    """Print the text that a run trained on in an update, with its document borders.

    Name the update, or a position of the data order.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    step: int | None = None
    """Update to show, from 1."""
    position: int | None = None
    """Show the batch that has this position, as bad-updates.jsonl numbers them from 0."""
    rank: int | None = None
    """Show only what this rank read; None shows all."""
    world_size: int = 1
    """Number of ranks that read the update."""
    limit: int = 4
    """Sequences to print at most; 0 prints all."""


def run(args: list[str]) -> None:
    """Print the sequences of an update."""
    options = parse(DataShowOptions, args, "fastllama data show")
    if (options.step is None) == (options.position is None):
        raise UsageError("Give one of --step and --position.")
    from fastllama.config import validate
    from fastllama.config.rules import MAX_INTEGER
    from fastllama.data.dataset import open_dataset
    from fastllama.run_folder import RunFolder
    from fastllama.training.batches import end_position, sequences_seen

    folder = RunFolder(options.run)
    config = folder.load_config()
    if options.world_size < 1:
        raise UsageError(f"--world-size must be at least 1, not {options.world_size}.")
    validate(config, options.world_size)
    if options.rank is not None and not 0 <= options.rank < options.world_size:
        raise UsageError(
            f"--rank {options.rank} is not among the {options.world_size} ranks from 0 on; give "
            "the number of ranks by --world-size."
        )
    if options.limit < 0:
        raise UsageError(f"--limit must be 0 or more, not {options.limit}.")
    per_update = config.positions_per_update
    if options.step is not None:
        step = options.step
        end = end_position(folder, config, step)
    else:
        assert options.position is not None
        if not 0 <= options.position <= MAX_INTEGER:
            raise UsageError(f"--position must be 0 to {MAX_INTEGER}, not {options.position}.")
        step = options.position // per_update + 1
        end = step * per_update
    dataset = open_dataset(config)
    seen = [
        each
        for each in sequences_seen(config, dataset, step, end, options.world_size)
        if options.rank in (None, each.rank)
    ]
    shown = seen[: options.limit or None]
    # After a rewind, a position does not tell its update.
    what = f"update {step} of " if options.step is not None else ""
    lines = [
        f"{what}{folder.path}: positions {end - per_update} to {end - 1}, "
        f"{len(seen)} sequences of {config.at(step).model.max_seq_len} tokens"
    ]
    for each in shown:
        source = f" of {each.source}" if each.source else ""
        lines.append(
            f"--- position {each.position}, rank {each.rank}, micro-batch {each.micro_batch}: "
            f"sequence {each.sequence}{source}, from token {each.first_token:,} on"
        )
        lines.append("\n--- end of the document\n".join(each.documents))
    if len(shown) < len(seen):
        lines.append(f"--- {len(seen) - len(shown)} more; --limit 0 prints all")
    print_result("\n".join(lines))
    require_stdout()


COMMAND = Command(run, {"runs/NAME --step N": "print the text that a run trained on in an update"})
