"""What happens between updates: validation, samples, checkpoints. All processes take part."""

import json
from dataclasses import dataclass

import torch
from rich.console import Console

from fastllama.checkpoints.state import TrainState
from fastllama.checkpoints.writing import CheckpointWriter
from fastllama.config import Config
from fastllama.data.dataset import Dataset
from fastllama.distributed.fsdp import reshard
from fastllama.distributed.world import World
from fastllama.inference.evaluate import bits_per_byte, validation_loss
from fastllama.inference.generate import generate_text
from fastllama.inference.sampling import Sampling
from fastllama.logs.recorder import Recorder
from fastllama.logs.sinks import append, outlived, plot_loss
from fastllama.run_folder import RunFolder


def validation_due(step: int, config: Config) -> bool:
    """Every `eval_interval` updates and after the last."""
    interval = config.training.eval_interval
    return interval > 0 and (step % interval == 0 or step == config.n_updates)


def sample_due(step: int, config: Config) -> bool:
    """After `sample_interval` updates, then after waits that grow, and after the last."""
    wait = float(config.logging.sample_interval)
    due = wait
    while 0 < due < step:
        wait *= config.logging.sample_growth
        due += round(wait)
    return due > 0 and step in (due, config.n_updates)


def checkpoint_due(step: int, config: Config) -> bool:
    """When the tokens trained on pass a multiple of `interval_tokens`."""
    interval, per_update = config.checkpoint.interval_tokens, config.training.tokens_per_update
    return interval > 0 and step * per_update // interval > (step - 1) * per_update // interval


@dataclass
class SideJobs:
    """The jobs of one run."""

    state: TrainState
    config: Config
    run: RunFolder
    dataset: Dataset
    world: World
    console: Console
    recorder: Recorder
    writer: CheckpointWriter

    def validate(self) -> None:
        """Measure the held-out loss, if there is held-out text."""
        if self.dataset.validation is None:
            return
        with self.recorder.side_job():
            loss = validation_loss(
                self.state.model, self.dataset.validation, self.config, self.world
            )
            reshard(self.state.model)
            self.recorder.add_validation(loss, bits_per_byte(loss, self.dataset))

    def sample(self) -> None:
        """Continue the sample prompt, show it and keep it."""
        logging, step = self.config.logging, self.state.progress.step
        if not logging.sample_interval:
            return
        sampling = Sampling(max_new_tokens=logging.sample_tokens, seed=self.config.training.seed)
        model = self.state.model
        self.recorder.flush()
        with self.recorder.side_job(), torch.compiler.set_stance("force_eager"):
            model.eval()
            text = "".join(
                generate_text(
                    model,
                    self.dataset.tokenizer,
                    logging.sample_prompt,
                    sampling,
                    self.dataset.manifest.end_token_id,
                    self.world.agree,
                )
            )
            model.train()
            reshard(model)
        if self.world.is_main:
            record = {"step": step, "prompt": logging.sample_prompt, "text": text}
            with outlived(self.console, f"The sample after {step} updates"):
                append(self.run.samples, json.dumps(record) + "\n")
        title = f"sample after {step} updates"
        self.console.rule(title, style="dim")
        self.console.print(logging.sample_prompt + text)
        self.console.rule(style="dim")

    def save(self) -> None:
        """Begin to write a checkpoint of this update, and draw the plot."""
        self.recorder.sync()
        with self.recorder.side_job():
            spikes = self.state.spikes
            # A save waits for the device anyway.
            self.state.progress.spikes = [] if spikes is None else spikes.state.tolist()
            self.writer.save(self.state.tensors(), self.state.progress)
            if self.world.is_main:
                with outlived(self.console, f"The plot {self.run.loss_plot}"):
                    plot_loss(self.run.metrics_csv, self.run.loss_plot, title=self.run.path.name)

    def finish(self) -> None:
        """Leave a complete checkpoint of this update.

        Raises:
            OSError: it could not be written.
        """
        step = self.state.progress.step
        self.writer.wait()
        if self.writer.saved_step != step:
            self.save()
            self.writer.wait()
        if self.writer.saved_step != step:
            raise OSError(f"{self.writer.failure}.")
