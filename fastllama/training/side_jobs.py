"""Side jobs between updates: validation, samples, checkpoints. All processes take part."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fastllama.checkpoints.folder import complete_checkpoints
from fastllama.checkpoints.remote import CheckpointUploader
from fastllama.checkpoints.state import TrainState
from fastllama.checkpoints.writing import CheckpointWriter
from fastllama.config import Config
from fastllama.distributed.compilation import CompileWatch
from fastllama.distributed.fsdp import reshard
from fastllama.errors import SideJobFailedError, reason
from fastllama.inference.evaluate import validation_loss
from fastllama.inference.generate import generate_text
from fastllama.inference.sampling import Sampling
from fastllama.logs.log_file import append
from fastllama.logs.plot import plot_loss
from fastllama.logs.sinks import Guard, report_write_errors
from fastllama.training.monitor import UpdateMonitor
from fastllama.training.session import Session
from fastllama.training.skipped_steps import Rewinder


def validation_due(step: int, config: Config) -> bool:
    """Every `eval_interval` updates, and after the last."""
    interval = config.training.eval_interval
    return interval > 0 and (step % interval == 0 or step == config.n_updates)


def sample_due(step: int, config: Config) -> bool:
    """After `sample_interval` updates, then after growing intervals, and after the last."""
    interval = due = float(config.logging.sample_interval)
    while 0 < due < step:
        # No longer than the run, so that no growth overflows.
        interval = min(interval * config.logging.sample_growth, config.n_updates)
        due += round(interval)
    return due > 0 and step in (due, config.n_updates)


def checkpoint_due(step: int, config: Config) -> bool:
    """When the tokens trained on pass a multiple of `interval_tokens`."""
    interval, per_update = config.checkpoint.interval_tokens, config.training.tokens_per_update
    return interval > 0 and step * per_update // interval > (step - 1) * per_update // interval


@dataclass
class SideJobs:
    """The side jobs of one training. Their time is excluded from the pace of training.

    Only the last checkpoint must succeed. Another side job that fails is reported, and training
    continues.
    """

    session: Session
    state: TrainState
    monitor: UpdateMonitor
    compile_watch: CompileWatch
    writer: CheckpointWriter
    rewinder: Rewinder
    _plot: Guard = field(init=False)

    def __post_init__(self) -> None:
        self._plot = Guard(f"The plot {self.session.run.loss_plot}", self.session.console.print)

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """Print an error of a side job that runs the model; leave the model ready to train.

        With several ranks only a `SideJobFailedError` is printed. Any other error may be one
        rank's alone, and the other ranks would wait for it in a collective.
        """
        session, model = self.session, self.state.model
        try:
            with self.state.computing():
                yield
        except Exception as error:
            if session.world.size > 1 and not isinstance(error, SideJobFailedError):
                raise
            session.console.print(
                f"No {what} after update {self.state.progress.step}: {reason(error)}; "
                "training continues."
            )
        finally:
            model.train()
            reshard(model)

    def validate(self) -> None:
        """Measure the loss on the validation sets, if there is one."""
        session, model = self.session, self.state.model
        if not session.dataset.validation:
            return
        with (
            self.monitor.side_job(),
            self._reported("validation"),
            self.compile_watch.validation(),
        ):
            results = {}
            for held_out in session.dataset.validation:
                results[held_out.name] = validation_loss(
                    model,
                    held_out.stream,
                    session.dataset.text_bytes,
                    session.config,
                    session.world,
                    session.packing,
                )
            self.monitor.recorder.add_validation(results)

    def sample(self) -> None:
        """Continue the sample prompt, print the text and log it."""
        session, step = self.session, self.state.progress.step
        logging = session.config.logging
        if not logging.sample_interval:
            return
        self.monitor.flush()
        text = None
        with (
            self.monitor.side_job(),
            self._reported("sample"),
            torch.compiler.set_stance("force_eager"),
        ):
            text = self._continue_prompt()
        if text is None:
            return
        if session.world.is_main:
            record = {"step": step, "prompt": logging.sample_prompt, "text": text}
            with report_write_errors(session.console, f"The sample after update {step}"):
                append(session.run.samples, json.dumps(record) + "\n")
        session.console.rule(f"sample after {step} updates", style="dim")
        session.console.print(logging.sample_prompt + text)
        session.console.rule(style="dim")

    def _continue_prompt(self) -> str:
        session, model = self.session, self.state.model
        logging, dataset = session.config.logging, session.dataset
        sampling = Sampling(max_new_tokens=logging.sample_tokens, seed=session.config.training.seed)
        model.eval()
        pieces = generate_text(
            model,
            dataset.tokenizer,
            logging.sample_prompt,
            sampling,
            dataset.end_token_id,
            session.world.agree,
        )
        return "".join(pieces)

    def save(self) -> None:
        """Start writing a checkpoint of this update, and draw the plot."""
        session, progress = self.session, self.state.progress
        self.monitor.flush()
        self.monitor.recorder.sync()
        with self.monitor.side_job():
            spikes = self.state.spikes
            # `tolist` waits for the device. The save waits too, so it costs nothing.
            progress.spikes = [] if spikes is None else spikes.state.tolist()
            self.writer.save(self.state.tensors(), progress)
            if session.world.is_main:
                with self._plot():
                    plot_loss(session.run.metrics_csv, session.run.loss_plot, session.run.path.name)

    def finish(self) -> None:
        """Make sure that a complete checkpoint of this update exists, and try to upload it.

        Raises:
            OSError: the checkpoint could not be written.
        """
        step = self.state.progress.step
        self.writer.wait()
        if self.writer.saved_step != step:
            self.save()
            self.writer.wait()
        if self.writer.saved_step != step:
            whole = complete_checkpoints(self.session.run.checkpoints)
            start = whole[0].name if whole else "the beginning"
            raise OSError(
                f"{self.writer.failure}; mend this, and the same command goes on from {start}."
            )
        self.writer.finish_uploads()

    def rewind(self) -> None:
        """Rewind to before the series of skipped updates that the monitor found.

        Raises:
            TrainingFailedError: there is no earlier checkpoint, or rewinding to it did not help.
        """
        assert self.monitor.skipped.series is not None
        with self.monitor.side_job():
            self.rewinder.rewind(self.monitor.skipped.series)
            self.monitor.restart()


@contextmanager
def side_jobs(session: Session, state: TrainState, began: float) -> Iterator[SideJobs]:
    """The side jobs of a training that started at `began`, by time.perf_counter.

    On exit, wait for the checkpoint that is being written.
    """
    world, console = session.world, session.console
    monitor = UpdateMonitor(session, state.progress)
    watch = CompileWatch(session.config, world, console, began)
    uploader = None
    if session.config.checkpoint.upload and world.is_main:
        uploader = CheckpointUploader(session.run, session.config, console.print)
    with CheckpointWriter(
        session.run.checkpoints,
        session.config,
        session.identity,
        world.device,
        console.print,
        uploader,
    ) as writer:
        rewinder = Rewinder(session, state, writer)
        yield SideJobs(session, state, monitor, watch, writer, rewinder)
