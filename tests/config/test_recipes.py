"""Recipes: `extends`, types, and errors that name the file."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from fastllama.config import Config, DataSource, ModelConfig, Stage, config_from_dict, load_recipe
from tests.config.with_options import with_options


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_recipe_overrides_its_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(
        tmp_path / "base" / "first.toml", "[model]\nn_embd = 64\nn_layers = 2\n[data]\npath = 'd'"
    )
    write(tmp_path / "base" / "second.toml", "extends = 'first.toml'\n[model]\nn_layers = 3")
    third = write(
        tmp_path / "third.toml", "extends = 'base/second.toml'\n[model]\nn_heads = 4\ntheta = 500"
    )
    model = ModelConfig(n_embd=64, n_layers=3, n_heads=4, theta=500)
    data = dataclasses.replace(Config().data, path="d")
    assert load_recipe(third) == Config(model=model, data=data)


def test_arrays_of_tables(tmp_path: Path) -> None:
    text = """
    [[data.sources]]
    path = "a"
    [[data.sources]]
    path = "b/"
    weight = 2
    [[data.stages]]
    start_tokens = 1e9
    weights = [1, 0.5]
    """
    config = load_recipe(write(tmp_path / "recipe.toml", text))
    assert config.data.sources == (DataSource("a"), DataSource("b/", weight=2))
    assert config.data.stages == (Stage(start_tokens=10**9, weights=(1, 0.5)),)
    assert config.data.source_names == ["a", "b"]
    # A run folder stores what it was given.
    assert config_from_dict(config.to_dict(), "test") == config
    # An array replaces the one of the recipe that it extends.
    text = "extends = 'recipe.toml'\n[[data.sources]]\npath = 'c'\n"
    data = load_recipe(write(tmp_path / "other.toml", text)).data
    assert (data.source_names, len(data.stages)) == (["c"], 1)


def test_cycle_of_extends_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", "extends = 'b.toml'")
    write(tmp_path / "b.toml", "extends = 'a.toml'")
    with pytest.raises(ValueError, match=r"a\.toml extends itself"):
        load_recipe(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends = 3", r"recipe\.toml: extends must be the path of one recipe, not 3"),
        (r'extends = "a\u0000b"', r"recipe\.toml: extends must be the path of one recipe"),
        ("extends = 'gone.toml'", r"no recipe .*gone\.toml, which .*/recipe\.toml extends"),
        ("extends = '.'", r"no recipe .*, which .*/recipe\.toml extends: it is a folder"),
        ("extends = '/dev/zero'", r"zero is not a regular file; .*/recipe\.toml extends it\."),
        (f"extends = '{300 * 'a'}'", r", which .*/recipe\.toml extends cannot be read: .*too long"),
        ("[model", r"recipe\.toml cannot be read as TOML"),
        (
            "[model]\nn_layer = 2",
            r"recipe\.toml: unknown option model\.n_layer; did you mean model\.n_layers\?",
        ),
        ("[model]\nmax_lr = 2", r"unknown option model\.max_lr; did you mean optimizer\.max_lr\?"),
        ("max_lr = 2", r"unknown option max_lr; did you mean optimizer\.max_lr\?"),
        ("[training]\nlr = 2", r"option training\.lr; did you mean optimizer\.max_lr\?"),
        ("[model]\nhidden_size = 2", r"model\.hidden_size; did you mean model\.n_embd\?"),
        ("model = 2", r"model is a group of options, \[model\], not a value"),
        (f"[model]\nn_embd = 1{5000 * '0'}", r"recipe\.toml cannot be read as TOML"),
        (f"a = {10_000 * '['}", r"recipe\.toml cannot be read as TOML"),
        ("[xyzzy]", r"unknown option xyzzy\.$"),
        ("[modle]\nn_layers = 2", r"unknown option modle"),
        ("[data]\nsources = 'a'", r"data\.sources must be an array of tables, not 'a'"),
        ("[data]\nsources = ['a']", r"data\.sources must be an array of tables, not \['a'\]"),
        (
            "[[data.sources]]\nfolder = 'a'",
            r"unknown option data\.sources\.0\.folder",
        ),
        (
            "[[data.sources]]\n[[data.sources]]\nwieght = 1",
            r"unknown option data\.sources\.1\.wieght; did you mean data\.sources\.1\.weight\?",
        ),
        (
            "[[data.stages]]\nmax_seq_len = 2.5",
            r"data\.stages\.0\.max_seq_len must be an integer or left out, not 2\.5",
        ),
        (
            "[[data.stages]]\nweights = [1, 'a']",
            r"data\.stages\.0\.weights must be an array of numbers, not \[1, 'a'\]",
        ),
    ],
)
def test_recipe_errors(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path / "recipe.toml", text))


@pytest.mark.parametrize(
    "text", ["[model]\nn_layer = 2", "[model]\nn_layers = []", "training = 2", "model"]
)
def test_error_names_the_recipe_with_the_mistake(tmp_path: Path, text: str) -> None:
    write(tmp_path / "base.toml", text)
    with pytest.raises(ValueError, match=r"base\.toml"):
        load_recipe(write(tmp_path / "recipe.toml", "extends = 'base.toml'"))


def test_recipe_that_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    for name, message in (
        ("pipe.toml", "is not a regular file"),
        ("zero.toml", "is not a regular file"),
        ("loop.toml", "cannot be read: Too many levels of symbolic links"),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            load_recipe(tmp_path / name)


def test_missing_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe .*gone\.toml"):
        load_recipe(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model__n_layers", 2.5, r"test: model\.n_layers must be an integer, not 2\.5"),
        ("model__n_layers", True, r"model\.n_layers must be an integer, not True"),
        ("model__n_kv_heads", "2", r"must be an integer or left out, not '2'"),
        ("model__theta", "big", r"must be a number, not 'big'"),
        ("model__theta", False, r"must be a number, not False"),
        ("model__tied_embeddings", 1, r"must be true or false, not 1"),
        ("data__path", 3, r"must be a string, not 3"),
        ("training__dtype", "float16", r"must be one of auto, bfloat16, float32, not 'float16'"),
        ("parallel__reshard_after_forward", 1, r"must be one of auto, true, false, not 1"),
        ("training__compile", "false", r"false, not 'false'; write it without quotes\."),
        ("model__tied_embeddings", "true", r"not 'true'; write it without quotes\."),
        ("training__dtype", "true", r"float32, not 'true'\."),
    ],
)
def test_value_of_another_type_is_an_error(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_options(**{option: value})


def test_whole_number_with_exponent(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.toml", "[training]\ntraining_tokens = 1.28e9\nz_loss = 1e0")
    training = load_recipe(path).training
    assert training.training_tokens == 1_280_000_000
    assert isinstance(training.training_tokens, int)
    assert isinstance(training.z_loss, float)


def test_recipe_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes("[logging]\nsample_prompt = 'é'".encode("utf-8-sig"))
    assert load_recipe(path).logging.sample_prompt == "é"
    path.write_bytes("[logging]\nsample_prompt = 'é'".encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe\.toml is not UTF-8 text: byte 27 is 0xe9"):
        load_recipe(path)


def test_run_folder_as_recipe_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "config.toml", "")
    with pytest.raises(ValueError, match=f"run folder, not a recipe; resume .*--resume {tmp_path}"):
        load_recipe(tmp_path)


def test_integer_for_a_number() -> None:
    assert with_options(optimizer__grad_clip=1).optimizer.grad_clip == 1


@pytest.mark.parametrize("value", ["auto", True, False])
def test_reshard_after_forward_values(value: str | bool) -> None:
    config = with_options(parallel__reshard_after_forward=value)
    assert config.parallel.reshard_after_forward == value
