"""Steps of a datatrove pipeline: its executors run and repeat the parts of a preparation."""

from inspect import signature
from pathlib import Path
from typing import Any

from fastllama.data.join import join
from fastllama.data.manifest import Manifest
from fastllama.data.parts import Part
from fastllama.data.prepare import prepare

try:
    from datatrove.pipeline.base import PipelineStep
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "fastllama.data.datatrove_step needs the library datatrove, which is not installed; "
        "install it with pip install 'fastllama[datatrove]'."
    ) from None


class PrepareParts(PipelineStep):
    """Prepares part `rank + 1` of `world_size`: the tasks of the executor are the parts.

    The step reads the input files itself, so it is the first of its pipeline.
    """

    name = "fastllama prepare"
    type = "TOKENIZER"

    def __init__(
        self, inputs: list[str], tokenizer: str | Path, output: str | Path, **settings: Any
    ) -> None:
        """Take the arguments of `prepare`; `settings` are those by name, such as `workers`.

        Raises:
            TypeError: `prepare` has no such setting, or it is `part`, which the executor chooses.
        """
        super().__init__()
        signature(prepare).bind(inputs, Path(tokenizer), Path(output), part=None, **settings)
        self.inputs = inputs
        self.tokenizer = Path(tokenizer)
        self.output = Path(output)
        self.settings = settings

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Prepare the part, or resume it.

        Raises:
            ValueError: as `prepare`, or another step comes first.
            OSError: reading or writing fails. The same task resumes.
        """
        if data is not None:
            raise ValueError(
                "PrepareParts reads files, which steps before it have not written yet: give it an "
                "executor of its own that depends on theirs"
            )
        part = Part(rank + 1, world_size)
        with self.track_time("part"):
            manifest = prepare(self.inputs, self.tokenizer, self.output, part=part, **self.settings)
        _count(self, manifest, "part")


class JoinParts(PipelineStep):
    """Joins the parts in `output`, in an executor of one task that depends on all parts."""

    name = "fastllama data join"
    type = "TOKENIZER"

    def __init__(self, output: str | Path) -> None:
        super().__init__()
        self.output = Path(output)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the manifest of all parts.

        Raises:
            ValueError: as `join`, or the executor has more than one task.
            OSError: reading or writing fails.
        """
        if world_size > 1:
            raise ValueError(f"JoinParts ran in {world_size} tasks: give its executor tasks=1")
        with self.track_time("folder"):
            manifest = join(self.output)
        _count(self, manifest, "folder")


def _count(step: PipelineStep, manifest: Manifest, unit: str) -> None:
    for name, split in manifest.splits.items():
        step.stat_update(f"{name} tokens", value=split.tokens, unit=unit)
        step.stat_update(f"{name} documents", value=split.documents, unit=unit)
    step.stat_update("malformed records", value=manifest.skipped_records, unit=unit)
