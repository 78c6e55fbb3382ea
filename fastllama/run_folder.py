"""The folder of a run: its files, its lock, and the record of how it was made."""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fastllama import __version__
from fastllama.atomic import LOCK_FILE, locked, report_once, set_aside, write_atomic
from fastllama.config import Config, ModelConfig, config_from_dict, validate_values
from fastllama.config.recipes import read_toml
from fastllama.data.dataset import Dataset
from fastllama.data.manifest import MANIFEST_FILE
from fastllama.typed_json import DamagedFileError, read_json


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def tokenizer_model(self) -> Path:
        """The SentencePiece model of an imported tokenizer, if there was one."""
        return self.path / "tokenizer.model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_csv(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def bad_updates(self) -> Path:
        return self.path / "bad-updates.jsonl"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def exists(self) -> bool:
        """Whether a run was started in this folder."""
        return self.config.is_file()

    def load_config(self) -> Config:
        """The resolved configuration of the run.

        Raises:
            ValueError: the folder holds no run, or its configuration cannot be read.
        """
        if not self.exists:
            run = RunFolder(self.path.parent.parent)
            if run.exists and run.checkpoints == self.path.parent:
                raise ValueError(f"{self.path} is a checkpoint; give its run folder {run.path}.")
            raise ValueError(f"{self.path} is not a run folder: {self._what_is_missing()}.")
        config = config_from_dict(read_toml(self.config), source=str(self.config))
        try:
            validate_values(config)
        except ValueError as error:
            raise ValueError(f"{self.config}: {error}") from None
        return config

    def _what_is_missing(self) -> str:
        """The rest of a sentence about a folder that holds no run."""
        if not os.path.lexists(self.path):
            return "it does not exist; see the folder runs"
        if RunFolder(self.path.parent).exists:
            return f"it is inside of one; give {self.path.parent}"
        if (self.path / "config.json").is_file():
            imported = f"fastllama import {shlex.quote(str(self.path))} --output runs/NAME"
            return f"it is a model of Hugging Face's; make a run of it with {imported}"
        return "it has no config.toml; see the folder runs"

    @contextmanager
    def locked(self, option: str = "--run-dir") -> Iterator[None]:
        """Hold the lock of the run, and create its folder, which `option` names.

        On exit, remove the folder if it was created here and is still empty.

        Raises:
            ValueError: another process holds the lock, or the path is not a folder, or a data
                folder.
        """
        if (self.path / MANIFEST_FILE).is_file():
            raise ValueError(f"{self.path} is a data folder; choose another {option}.")
        created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        _make_folder(self.path, f"choose another {option}")
        with locked(self.path):
            try:
                yield
            finally:
                if created:
                    self._remove_if_empty(created)

    def _remove_if_empty(self, folders: list[Path]) -> None:
        with suppress(OSError):
            if set(os.listdir(self.path)) <= {LOCK_FILE}:
                (self.path / LOCK_FILE).unlink(missing_ok=True)
                for folder in folders:
                    folder.rmdir()

    @property
    def has_checkpoints(self) -> bool:
        """Whether the run ever saved a checkpoint that is still here, damaged ones included."""
        patterns = ("step-*", "passed-over-step-*")
        return any(any(self.checkpoints.glob(pattern)) for pattern in patterns)

    def refuse_other_options(self, config: Config) -> None:
        """Raise ValueError if the folder holds a run with options other than `config`.

        The options of a run without a checkpoint may change: a start that failed, say for lack of
        memory, has nothing to resume.
        """
        if not (self.exists and self.has_checkpoints):
            return
        before, now = self.load_config().to_dict(), config.to_dict()
        for group, options in now.items():
            for name in sorted(options.keys() | before[group].keys()):
                old, new = before[group].get(name), options.get(name)
                if old != new:
                    raise ValueError(
                        f"{self.path} holds a run with {group}.{name} = {_shown(old)}, not "
                        f"{_shown(new)}; choose another --run-dir for a new run, or resume with "
                        f"--resume {self.path}."
                    )

    def refuse_other_branch(self, origin: Path) -> None:
        """Raise ValueError if the folder holds a run that did not branch off from `origin`."""
        if not self.has_checkpoints:
            return
        origins = {each.get("branched_from") for each in self._sessions()}
        if os.path.realpath(origin) not in origins:
            path = shlex.quote(str(self.path))
            raise ValueError(
                f"{self.path} holds a run that did not branch off from {origin}; choose another "
                f"--run-dir, or resume that run with --resume {path}."
            )

    def create(
        self,
        config: Config,
        tokenizer: Path,
        branched_from: Path | None = None,
        resumed_from: str | None = None,
        chosen: Mapping[str, Any] | None = None,
    ) -> None:
        """Write options, tokenizer and environment of a new or resumed run.

        `branched_from` is the checkpoint of another run that this one begins with, `resumed_from`
        the name of one of its own that it was told to resume from. `chosen` has the values of
        options that are "auto"; those of a resumed run that differ from before are reported on
        stderr. Other options of a start that saved no checkpoint are set aside.

        Raises:
            ValueError: `checkpoints` is not a folder, or a folder has the name of a file.
            OSError: a file cannot be written.
        """
        for path in (self.tokenizer, self.config):
            if path.is_dir():
                raise ValueError(f"{path} is a folder; move it away.")
        _make_folder(self.checkpoints, "move it away, or mount the disk that it links to")
        write_atomic(self.tokenizer, tokenizer.read_bytes())
        self._record_session(branched_from, resumed_from, chosen or {})
        if self.exists and not self.has_checkpoints and self.load_config() != config:
            aside = set_aside(self.config)
            report_once(
                str(self.config),
                f"{self.path} has no checkpoint: it starts anew, and its options are kept as "
                f"{aside.name}.",
            )
        write_atomic(self.config, resolved_toml(config))

    def resumed_alike(self, checkpoint: str, config: Config) -> bool:
        """Whether the last session resumed from this checkpoint of the run, with these options."""
        if not self.exists or self.load_config() != config:
            return False
        return [each.get("resumed_from") for each in self._sessions()][-1:] == [checkpoint]

    def _record_session(
        self, branched_from: Path | None, resumed_from: str | None, chosen: Mapping[str, Any]
    ) -> None:
        sessions, session = self._sessions(), environment()
        if branched_from is not None:
            session["branched_from"] = os.path.realpath(branched_from)
        if resumed_from is not None:
            session["resumed_from"] = resumed_from
        session["chosen"] = dict(chosen)
        before = sessions[-1].get("chosen") if sessions else None
        if self.has_checkpoints and isinstance(before, dict):
            self._report_other_choices(before, chosen)
        content = json.dumps([*sessions, session], indent=2)
        write_atomic(self.environment, content + "\n")

    def _report_other_choices(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in sorted(before.keys() & now.keys()):
            old, new = (str(each[name]).lower() for each in (before, now))
            if old != new:
                flag = f"--{name.replace('_', '-')} {old}"
                report_once(
                    f"{self.path} {name}",
                    f'{self.path}: {name} = "auto" is {new} here and was {old} before, so the '
                    f"numbers will differ slightly; {flag} keeps it.",
                )

    def _sessions(self) -> list[dict[str, Any]]:
        """What `environment` returned at each start. A damaged file is set aside."""
        path = self.environment
        if not os.path.lexists(path):
            return []
        try:
            return read_json(path, list[dict[str, Any]])
        except (DamagedFileError, OSError) as error:
            reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
            aside = set_aside(path)
            report_once(str(path), f"Not used: {reason}. It is kept as {aside.name}.")
            return []


def _shown(value: Any) -> str:
    """The value of an option in a sentence."""
    return '""' if value == "" else str(value)


def _make_folder(path: Path, remedy: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{path} is not a folder, or is inside a file; {remedy}.") from None


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """The options that shape a model. Dropout is left out, because it has no weights."""
    options = {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
    del options["model.dropout"]
    return options


def run_identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """The options that all sessions of a run share: its model, its data, and its data order."""
    return {
        **model_identity(config.model),
        "training.seed": config.training.seed,
        "training.tokens_per_update": config.training.tokens_per_update,
        "data.fingerprint": dataset.fingerprint(),
        "data.end_token_id": dataset.end_token_id,
        "data.document_mask": config.data.document_mask,
        **_order_identity(config),
    }


def _order_identity(config: Config) -> dict[str, Any]:
    """What decides the data order besides the data. JSON has lists, and no tuples."""
    stages = [
        [stage.start_tokens, changed.model.max_seq_len, changed.model.theta]
        for stage, changed in zip(config.data.stages, config.stages[1:], strict=True)
    ]
    weights = [[start, list(each)] for start, each in config.weights] if config.is_mixture else []
    return {"data.stages": stages, "data.weights": weights}


def resolved_toml(config: Config) -> str:
    """A recipe with every option of the configuration."""
    return tomli_w.dumps(config.to_dict())


def environment() -> dict[str, Any]:
    """When, where, how and with which packages this process was started."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        # JSON cannot hold a byte that is not UTF-8.
        "command": [
            os.fsencode(part).decode(errors="backslashreplace")
            for part in (sys.executable, *sys.argv)
        ],
        "fastllama": __version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "triton", "numpy", "tokenizers")},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "hostname": platform.node(),
    }


def git_revision() -> str | None:
    """Commit of the source, with -dirty for uncommitted changes; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(
            [*command, "--abbrev=40", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
