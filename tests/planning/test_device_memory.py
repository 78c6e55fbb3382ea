"""What a user reads about the memory of a device, and how its allocator is set."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastllama.training.setup as setup
from fastllama.cli import main
from fastllama.config import Config, load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.distributed.world import distributed
from fastllama.run_folder import RunFolder
from tests.sessions import bare_session, fresh_start
from tests.workspace import Workspace

RECIPE = Path(__file__).parents[2] / "configs" / "llama-3.1-8b.toml"
EXPANDABLE = "expandable_segments:True"
# PyTorch 2.11 and 2.12 refuse an option that they do not know.
CHOSEN = EXPANDABLE + (",pinned_max_round_threshold_mb:1" if torch.__version__ >= "2.13" else "")


def print_config(monkeypatch: pytest.MonkeyPatch, gibibytes: int) -> None:
    """Print the 8B recipe for 8 processes with GPUs of this size."""
    properties = SimpleNamespace(total_memory=gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("WORLD_SIZE", "8")
    main(["train", str(RECIPE), "--print-config"])


def test_print_config_shows_all_sums_and_the_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_config(monkeypatch, gibibytes=80)
    printed = capsys.readouterr().out
    for line in (
        "# GiB/device             82.2: parameters kept for the backward, gradients summed whole",
        "# GiB/device             44.5: parameters freed after the forward, gradients summed in ",
        "# memory                 parameters kept for the backward, gradients summed in shards: "
        "56.1 of 80.0 GiB; 82.2 with parameters kept",
    ):
        assert line in printed


def test_print_config_shows_the_refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_config(monkeypatch, gibibytes=40)
    assert "# memory                 The smallest plan needs 44.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("set_by_user", "name", "value"),
    [
        ({}, "PYTORCH_ALLOC_CONF", CHOSEN),
        ({"PYTORCH_ALLOC_CONF": ""}, "PYTORCH_ALLOC_CONF", ""),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, "PYTORCH_CUDA_ALLOC_CONF", "a:1"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": "b:2"},
            "PYTORCH_CUDA_ALLOC_CONF",
            "a:1",
        ),
    ],
)
def test_segments_expand_on_cuda_unless_the_user_sets_the_allocator(
    set_by_user: dict[str, str],
    name: str,
    value: str,
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = {key: text for key, text in os.environ.items() if "ALLOC_CONF" not in key}
    monkeypatch.setattr(os, "environ", {**environment, **set_by_user})
    run = RunFolder(tmp_path)
    setup.prepare_environment(Config(), run)
    assert {key for key in os.environ if "ALLOC_CONF" in key} == set(set_by_user)

    monkeypatch.setattr(setup, "choose_device", lambda kind: torch.device("cuda"))
    setup.prepare_environment(Config(), run)
    assert {key for key in os.environ if "ALLOC_CONF" in key} == set(set_by_user) | {name}
    assert os.environ[name] == value

    config = load_recipe(workspace.recipe)
    with distributed(config) as world:
        session = bare_session(config, world, open_dataset(config))
    on_cuda = dataclasses.replace(world, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    session = dataclasses.replace(session, world=on_cuda)
    assert f"alloc   {name}={value}" in setup.describe_run(session, fresh_start(), "")


def test_torch_reads_the_setting_after_it_is_imported() -> None:
    # Its error about a value that it cannot read shows that it has read it.
    script = (
        "import os, torch\n"
        "os.environ['PYTORCH_ALLOC_CONF'] = 'expandable_segments:Maybe'\n"
        "torch._C._accelerator_setAllocatorSettings('')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "Expected 'True' or 'False'" in done.stderr
