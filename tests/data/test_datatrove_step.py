"""Parts of a preparation as tasks of a datatrove executor."""

import json
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fastllama.data.manifest import Manifest
from fastllama.data.parts import Part
from tests.workspace import Workspace

ROOT = Path(__file__).parents[2]
MODULE = "fastllama.data.datatrove_step"


def needs_datatrove(test: Any) -> Any:
    is_missing = find_spec("datatrove") is None
    skipped = pytest.mark.skipif(is_missing, reason="no datatrove: make test-all installs it")
    return pytest.mark.extra(skipped(test))


def executor(step: Any, folder: Path, tasks: int = 1) -> Any:
    """An executor that runs its tasks one after another in this process."""
    local = import_module("datatrove.executor").LocalPipelineExecutor
    return local([step], tasks=tasks, workers=1, logging_dir=str(folder))


@needs_datatrove
def test_pipeline_of_the_page(workspace: Workspace, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    (script,) = (
        block
        for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        if "datatrove" in block
    )
    for path, own in {
        "/shared/corpus": workspace.corpus,
        "/shared/tokenizer.json": workspace.tokenizer,
        "/shared/data/mine": tmp_path / "data",
        "/shared/logs": tmp_path / "logs",
        "tasks=16": "tasks=3",
        "workers=4": "workers=2",
        "workers=8": "workers=1",
    }.items():
        assert path in script
        script = script.replace(path, str(own))
    exec(script, {"__name__": "__main__"})
    single = Manifest.load(workspace.data)
    joined = Manifest.load(tmp_path / "data")
    assert joined.splits["train"].documents == sum(s.documents for s in single.splits.values())
    (stats,) = json.loads((tmp_path / "logs" / "join" / "stats.json").read_text())
    assert stats["stats"]["train tokens"]["total"] == joined.splits["train"].tokens
    (stats,) = json.loads((tmp_path / "logs" / "parts" / "stats.json").read_text())
    assert stats["stats"]["train tokens"]["total"] == joined.splits["train"].tokens


@needs_datatrove
def test_failed_task_runs_again(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(MODULE)
    ran = []

    def prepare(*args: Any, part: Part, **settings: Any) -> Manifest:
        ran.append(part.number)
        if ran == [1, 2]:
            raise OSError("no space left on the device")
        return original(*args, part=part, **settings)

    step = module.PrepareParts(
        [str(workspace.corpus)], workspace.tokenizer, tmp_path / "data", validation_fraction=0.1
    )
    original = module.prepare
    monkeypatch.setattr(module, "prepare", prepare)
    with pytest.raises(OSError, match="no space"):
        executor(step, tmp_path / "logs", tasks=3).run()
    executor(step, tmp_path / "logs", tasks=3).run()
    assert ran == [1, 2, 2, 3]
    executor(module.JoinParts(tmp_path / "data"), tmp_path / "logs-join").run()
    joined = Manifest.load(tmp_path / "data")
    joined.check_contents(tmp_path / "data")
    single = Manifest.load(workspace.data)
    assert {name: split.tokens for name, split in joined.splits.items()} == {
        name: split.tokens for name, split in single.splits.items()
    }


@needs_datatrove
def test_wrong_pipelines(workspace: Workspace, tmp_path: Path) -> None:
    module = import_module(MODULE)
    output = tmp_path / "data"
    step = module.PrepareParts([str(workspace.corpus)], str(workspace.tokenizer), str(output))
    with pytest.raises(ValueError, match="give it an executor of its own"):
        step.run(iter(()))
    assert not output.exists()
    for settings in ({"shard_token": 5}, {"part": Part(1, 2)}):
        with pytest.raises(TypeError, match=r"shard_token|part"):
            module.PrepareParts([str(workspace.corpus)], workspace.tokenizer, output, **settings)
    with pytest.raises(ValueError, match="in 2 tasks: give its executor tasks=1"):
        module.JoinParts(output).run(world_size=2)


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.base", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastllama\[datatrove\]'"):
        import_module(MODULE)
