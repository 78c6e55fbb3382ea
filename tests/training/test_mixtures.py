"""Training on a mixture in stages: what it reads, what it logs, resuming, and its weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.cli import main
from fastllama.config import Config, load_recipe
from fastllama.data.dataset import Dataset, open_dataset
from fastllama.data.prepare import prepare
from fastllama.inference.load import load_run
from fastllama.logs.rows import read_rows
from fastllama.model.llama import Llama
from fastllama.model.rotary import rotary_tables
from tests.cli.refusal import refusal
from tests.ranks import launch
from tests.runs import losses, train, train_in_child
from tests.workspace import Workspace

EVERY_UPDATE = ("--checkpoint.interval-tokens", 256, "--checkpoint.keep-last", 20)

TABLES = """
[[data.sources]]
path = "{web}"
weight = 3
[[data.sources]]
path = "{code}"
weight = 1
max_epochs = 2
[[data.stages]]
start_tokens = 1000
max_seq_len = 64
batch_size = 1
theta = 500000.0
[[data.stages]]
start_tokens = 2048
weights = [1, 9]
"""


@pytest.fixture(scope="module")
def recipe(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 updates of 256 tokens: 4 of 32 tokens a sequence, and 6 of 64, the last 2 mostly code."""
    folder = tmp_path_factory.mktemp("mixture")
    texts = sorted(workspace.corpus.iterdir())
    for name, part in (("web", texts[:40]), ("code", texts[40:])):
        (folder / f"{name}-texts").mkdir()
        for text in part:
            shutil.copy(text, folder / f"{name}-texts")
        prepare(
            [str(folder / f"{name}-texts")],
            workspace.tokenizer,
            folder / name,
            validation_fraction=0.1,
        )
    tables = TABLES.format(web=folder / "web", code=folder / "code")
    path = folder / "mixture.toml"
    path.write_text(workspace.recipe.read_text().replace(f'path = "{workspace.data}"', tables))
    return path


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Inputs and losses of each micro-batch that a training in this process reads."""
    seen: list[tuple[Tensor, Tensor]] = []
    forward = Llama.forward

    def recording(model: Llama, tokens: Tensor, *args: Any, **options: Any) -> Any:
        result = forward(model, tokens, *args, **options)
        if options.get("return_losses"):
            seen.append((tokens.clone(), result[1]))
        return result

    monkeypatch.setattr(Llama, "forward", recording)
    return seen


def expected_inputs(config: Config, dataset: Dataset, step: int) -> tuple[list[int], Tensor]:
    """Sources and inputs of the sequences of an update."""
    seq_len = config.at(step).model.max_seq_len
    n_sequences = 256 // seq_len
    # Positions are sequences of 64 tokens, and an update has 4.
    first = (step - 1) * 4 * (64 // seq_len)
    places = dataset.train.places(range(first, first + n_sequences), seq_len)
    tokens = torch.tensor([read.tolist() for read in dataset.train.read(places, seq_len)])
    return [place.source for place in places], tokens[:, :-1]


def test_batches_and_logs(
    recipe: Path,
    tmp_path: Path,
    batches: list[tuple[Tensor, Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    train(recipe, "--run-dir", run, "--logging.log-interval", 2, "--training.eval-interval", 10)
    printed = capsys.readouterr().out
    assert "data    2 sources; held out: web " in printed
    assert "source  web: 75%, " in printed
    assert "stage   from update 5: 1 x 64, theta 500000, web 75%, code 25%\n" in printed
    assert "stage   from update 9: 1 x 64, theta 500000, web 10%, code 90%\n" in printed
    config, dataset = load_recipe(recipe), open_dataset(load_recipe(recipe))
    # The later stages are warmed up with two micro-batches of zeros each.
    warm_ups, trained = batches[:4], iter(batches[4:])
    assert all(tokens.shape == (1, 64) and not tokens.any() for tokens, _ in warm_ups)
    of_source: dict[int, list[tuple[int, float]]] = {0: [], 1: []}
    for step in range(1, 11):
        sources, inputs = expected_inputs(config, dataset, step)
        n_micro_batches = config.at(step).accumulation_steps(1)
        found = [next(trained) for _ in range(n_micro_batches)]
        assert torch.equal(torch.cat([tokens for tokens, _ in found]), inputs)
        means = torch.cat([each.double().mean(1) for _, each in found])
        for source, mean in zip(sources, means.tolist(), strict=True):
            of_source[source].append((step, mean))
    rows = {int(row["step"]): row for row in read_rows(run / "metrics.csv")}
    # Sums of float32 over a few sequences.
    for step in (4, 6, 10):
        for number, name in enumerate(("web", "code")):
            since = [mean for at, mean in of_source[number] if step - 1 <= at <= step]
            mean = pytest.approx(sum(since) / len(since), rel=1e-6) if since else None
            assert rows[step].get(f"loss/{name}") == mean
    assert rows[4]["tokens/web"] == 0.75 * 1024
    # Of the last 8 sequences, 0.8 would be from the web. It has none of them.
    assert "loss/web" not in rows[10]
    assert (rows[10]["tokens/web"], rows[10]["tokens/code"]) == (24 * 64, 16 * 64)
    assert rows[10]["val_loss"] == rows[10]["val_loss/web"] != rows[10]["val_loss/code"]
    assert rows[10]["val_bits_per_byte/code"] > 0


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    """A finished run with a checkpoint of each update."""
    run = recipe.parent / "run"
    train(recipe, "--run-dir", run, *EVERY_UPDATE)
    return run


def test_resume_across_stages_is_bit_identical(finished: Path, tmp_path: Path) -> None:
    expected = losses(finished)
    for step in (8, 3):
        run = tmp_path / f"{step}"
        checkpoint = finished / "checkpoints" / f"step-{step:08}"
        train("--resume", checkpoint, "--run-dir", run)
        found = losses(run)
        assert found == {at: expected[at] for at in range(step + 1, 11)}


def test_weights_have_the_rotary_base_of_their_stage(finished: Path) -> None:
    for checkpoint, theta, seq_len in (("step-00000004", 1e4, 32), ("step-00000005", 5e5, 64)):
        loaded = load_run(finished / "checkpoints" / checkpoint, torch.device("cpu")).model
        assert (loaded.config.theta, loaded.config.max_seq_len) == (theta, seq_len)
        assert torch.equal(loaded.cos_PR, rotary_tables(loaded.config)[0].float())


def test_another_mixture_does_not_resume(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, named in (
        (("--data.sources.0.weight", 4), "weights of data.sources = [3, 1], then [1, 9], not [4"),
        (
            ("--data.stages.0.theta", 100.0),
            "data.stages (start_tokens, max_seq_len, theta) = [[1000, 64, 500000.0], [2048, 64, ",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            train("--resume", finished, "--training.training-tokens", 2816, *option)
        assert stop.value.code == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize("place", ["--step=3", "--step=7", "--position=9", "--position=27"])
def test_data_show_prints_what_the_model_saw(
    finished: Path, recipe: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    main(["data", "show", str(finished), place, "--limit", "0"])
    printed = capsys.readouterr().out.removesuffix("\n")
    header, *shown = printed.split("\n--- position ")
    step = 3 if place in ("--step=3", "--position=9") else 7
    first = 4 * (step - 1)
    what = f"update {step} of " if "step" in place else ""
    assert header.startswith(f"{what}{finished}: positions {first} to {first + 3}, ")
    config, dataset = load_recipe(recipe), open_dataset(load_recipe(recipe))
    sources, inputs = expected_inputs(config, dataset, step)
    assert len(shown) == len(sources)
    for text, source, tokens in zip(shown, sources, inputs.tolist(), strict=True):
        line, _, body = text.partition("\n")
        assert f" of {dataset.sources[source].name}, from token " in line
        documents = body.split("\n--- end of the document\n")
        assert len(documents) == 1 + tokens.count(dataset.end_token_id)
        ids = [token for token in tokens if token != dataset.end_token_id]
        assert "".join(documents) == dataset.tokenizer.decode(ids)


def test_data_show_of_a_rank(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*arguments: str) -> list[str]:
        main(["data", "show", str(finished), "--step=2", *arguments])
        return capsys.readouterr().out.split("--- position ")[1:]

    every = [text.partition(":")[2].strip() for text in shown("--limit=0")]
    of_ranks = []
    for rank in range(2):
        texts = shown("--limit=0", "--world-size=2", f"--rank={rank}")
        assert all(f", rank {rank}, micro-batch {n // 2}:" in text for n, text in enumerate(texts))
        of_ranks.append([text.partition(":")[2].strip() for text in texts])
    # Two micro-batches of 2 sequences for each rank.
    first, second = of_ranks
    assert first[:2] + second[:2] + first[2:] + second[2:] == every
    assert shown()[-1].endswith("\n--- 4 more; --limit 0 prints all\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give one of --step and --position."),
        (["--step=1", "--position=1"], "Give one of --step and --position."),
        (["--step=11"], "has checkpoints up to update 10, and none of update 11"),
        (["--step=0"], "and none of update 0; give a --step from 1 to 10"),
        (["--position=-1"], "--position must be 0 to 9223372036854775807, not -1."),
        (["--position=9223372036854775808"], "7, not 9223372036854775808."),
        (["--step=1", "--limit=-1"], "--limit must be 0 or more, not -1."),
        (["--step=1", "--rank=1"], "--rank 1 is not among the 1 ranks"),
        (["--step=1", "--world-size=0"], "--world-size must be at least 1, not 0"),
    ],
)
def test_data_show_refusals(
    finished: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refusal(capsys, "data", "show", finished, *arguments)


@pytest.mark.slow  # Starts two processes.
def test_two_ranks_train_alike(recipe: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(recipe, "--run-dir", one)
    arguments = ["train", str(recipe), "--run-dir", str(two)]
    outcome = launch(2, arguments, tmp_path / "log", prepare=lambda rank: None)
    assert set(outcome.codes) == {0}, outcome.printed
    for mine, other in zip(
        read_rows(one / "metrics.csv"), read_rows(two / "metrics.csv"), strict=True
    ):
        for name, value in mine.items():
            if name.startswith(("loss", "val_", "tokens/")):
                # Float32 sums in another order, ten updates deep.
                assert other[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--data.sources.1.max-epochs", 0.05),
            "the run reads the source code 0.1",
        ),
        (
            ("--data.sources.1.weight", 0.0, "--data.stages.1.weights", 1, 0),
            "the run never reads the source code",
        ),
        (("--data.sources.1.path", "nowhere"), "data folder nowhere does not exist"),
        (
            (
                *("--data.stages.0.max-seq-len", 2**20, "--training.tokens-per-update", 2**20),
                *("--training.training-tokens", 10 * 2**20),
                *("--data.stages.1.start-tokens", 3 * 2**20),
            ),
            "max_seq_len of data.stages = 1048576 is longer than the data",
        ),
    ],
)
def test_source_that_does_not_fit_is_an_error(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[Any, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        train(recipe, "--run-dir", tmp_path / "run", *options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sources_with_different_tokenizers(
    recipe: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastllama.data.tokenizer import save_tokenizer, train_tokenizer

    save_tokenizer(train_tokenizer(["other other other"], 270), tmp_path / "other.json")
    prepare([str(workspace.corpus)], tmp_path / "other.json", tmp_path / "other")
    for option in ("--data.sources.1.path", "--data.sources.0.path"):
        with pytest.raises(SystemExit):
            train(recipe, "--run-dir", tmp_path / "run", option, tmp_path / "other")
        assert "were prepared with different tokenizers;" in capsys.readouterr().err


def test_validation_set_without_its_split(
    recipe: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([str(workspace.corpus)], workspace.tokenizer, tmp_path / "train-only")
    text = recipe.read_text()
    for path in (workspace.data, tmp_path / "train-only"):
        text += f'[[data.validation]]\npath = "{path}"\n'
    (tmp_path / "sets.toml").write_text(text)
    error = refusal(capsys, "train", tmp_path / "sets.toml", "--run-dir", tmp_path / "run")
    assert "train-only has 0 tokens in its validation split" in error
    assert "name the other split by data.validation.1.split." in error


def test_named_validation_sets(recipe: Path, workspace: Workspace, tmp_path: Path) -> None:
    text = recipe.read_text() + (
        f'[[data.validation]]\npath = "{workspace.data}"\nname = "all"\n'
        f'[[data.validation]]\npath = "{recipe.parent / "code"}"\nsplit = "train"\n'
    )
    (tmp_path / "sets.toml").write_text(text)
    run = tmp_path / "run"
    train(tmp_path / "sets.toml", "--run-dir", run)
    last = read_rows(run / "metrics.csv")[-1]
    assert last["val_loss"] == last["val_loss/all"] != last["val_loss/code"]
    assert "val_loss/web" not in last


def test_one_source_trains_like_its_path(workspace: Workspace, tmp_path: Path) -> None:
    table = f'[[data.sources]]\npath = "{workspace.data}"\n'
    text = workspace.recipe.read_text().replace(f'path = "{workspace.data}"', table)
    (tmp_path / "one.toml").write_text(text)
    options = ("--training.training-tokens", 512, "--optimizer.warmup-iterations", 0)
    train(workspace.recipe, "--run-dir", tmp_path / "path", *options)
    train(tmp_path / "one.toml", "--run-dir", tmp_path / "source", *options)
    assert losses(tmp_path / "path") == losses(tmp_path / "source")


@pytest.mark.slow  # Two trainings.
def test_stages_with_documents_kept_apart(recipe: Path, tmp_path: Path) -> None:
    options = ("--data.document-mask", "true", *EVERY_UPDATE)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(recipe, "--run-dir", whole, *options)
    train("--resume", whole / "checkpoints" / "step-00000003", "--run-dir", resumed)
    expected = losses(whole)
    assert losses(resumed) == {step: expected[step] for step in range(4, 11)}


@pytest.mark.slow  # Compiles three shapes.
@pytest.mark.parametrize("scope", ["block", "model"])
def test_later_stages_are_compiled_before_the_first_update(
    recipe: Path, tmp_path: Path, scope: str
) -> None:
    # Sequences of 32, of 64, and of 16 tokens.
    options = ("--data.stages.1.max-seq-len", 16, "--data.stages.1.batch-size", 4)
    compiled = ("--training.compile", "true", "--training.compile-scope", scope)
    # In a process of its own, which has no graphs yet.
    child = train_in_child(recipe, "--run-dir", tmp_path / "run", *options, *compiled)
    assert child.returncode == 0, child.stderr
    assert "graphs compiled" in child.stdout
    assert "more graphs" not in child.stdout


def test_a_run_with_stages_does_not_resume_without_them(
    finished: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    text = recipe.read_text()
    without = text[: text.index("[[data.stages]]")] + text[text.index("[optimizer]") :]
    (run / "config.toml").write_text(without)
    with pytest.raises(SystemExit) as stop:
        train("--resume", run, "--training.training-tokens", 2816)
    assert stop.value.code == 2
    assert (
        "was trained with data.stages (start_tokens, max_seq_len, theta) = [[1000, 64, "
        in capsys.readouterr().err
    )


@pytest.mark.slow  # A training.
def test_micro_batch_of_a_stage_may_change_on_resume(finished: Path, tmp_path: Path) -> None:
    checkpoint, run = finished / "checkpoints" / "step-00000003", tmp_path / "run"
    train("--resume", checkpoint, "--run-dir", run, "--data.stages.0.batch-size", 2)
    for step, loss in losses(run).items():
        # The same sequences, in sums of float32 over other micro-batches.
        assert float(loss) == pytest.approx(float(losses(finished)[step]), rel=1e-4)


def test_merged_weights_have_the_stage_of_their_checkpoints(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = finished / "checkpoints"
    of_stage = [str(checkpoints / f"step-{step:08}") for step in (4, 9, 10)]
    main(["merge", *of_stage[1:], "--output", str(tmp_path / "merged")])
    model = load_run(tmp_path / "merged", torch.device("cpu")).model
    assert (model.config.theta, model.config.max_seq_len) == (5e5, 64)
    message = refusal(capsys, "merge", *of_stage[:2], "--output", str(tmp_path / "other"))
    assert "only weights of one model can be averaged" in message
