import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from fastllama.config import (
    Config,
    ModelConfig,
    config_from_dict,
    known_keys,
    load_recipe,
    validate,
)

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
# An update of the quickstart is two micro-batches: it is for two processes at most.
WORLD_SIZES = {"quickstart": (1, 2)}

# Adding, renaming or removing an option changes what old runs and recipes mean, so it has to be
# done here too.
OPTIONS = """
    model.vocab_size model.n_embd model.n_layers model.n_heads model.n_kv_heads model.multiple_of
    model.ffn_multiplier model.eps model.theta model.dropout model.max_seq_len
    model.tied_embeddings model.logit_softcap model.rope_scaling_factor
    model.rope_low_freq_factor model.rope_high_freq_factor model.rope_original_max_seq_len
    data.path data.tokenizer data.prefetch
    optimizer.max_lr optimizer.min_lr optimizer.schedule optimizer.warmup_iterations
    optimizer.decay_fraction optimizer.beta1 optimizer.beta2 optimizer.adam_eps
    optimizer.weight_decay optimizer.grad_clip
    training.batch_size training.tokens_per_update training.training_tokens training.seed
    training.z_loss training.label_smoothing training.eval_interval training.eval_tokens
    training.dtype training.device training.compile
    training.compile_scope training.activation_checkpointing training.kernels training.attention
    training.deterministic training.spike_z_score training.max_bad_updates training.rewind_after
    training.max_wall_time
    parallel.replicate parallel.reshard_after_forward parallel.reduce_dtype parallel.timeout_minutes
    checkpoint.interval_tokens checkpoint.keep_last checkpoint.keep_every_tokens
    logging.log_interval logging.sample_interval logging.sample_growth logging.sample_prompt
    logging.sample_tokens logging.tensorboard
"""


def with_options(**options: Any) -> Config:
    """The defaults with `group__field=value` changed."""
    values: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        group, _, key = name.partition("__")
        values.setdefault(group, {})[key] = value
    return config_from_dict(values, source="test")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_options_are_these() -> None:
    assert known_keys() == OPTIONS.split()


def test_the_defaults_work() -> None:
    validate(Config())
    assert config_from_dict({}, source="test") == Config()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_work(recipe: Path) -> None:
    for world_size in WORLD_SIZES.get(recipe.stem, (1, 8)):
        validate(load_recipe(recipe), world_size)


def test_a_recipe_overrides_what_it_extends(tmp_path: Path) -> None:
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


def test_extends_may_not_go_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", "extends = 'b.toml'")
    write(tmp_path / "b.toml", "extends = 'a.toml'")
    with pytest.raises(ValueError, match=r"a\.toml extends itself"):
        load_recipe(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends = 3", r"recipe\.toml: extends must be the path of one recipe, not 3"),
        ("extends = 'gone.toml'", r"no recipe .*gone\.toml"),
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
    ],
)
def test_refuses_a_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path / "recipe.toml", text))


def test_names_a_missing_recipe(tmp_path: Path) -> None:
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
        ("training__dtype", "float16", r"must be one of bfloat16, float32, not 'float16'"),
        ("parallel__reshard_after_forward", 1, r"must be one of auto, true, false, not 1"),
    ],
)
def test_refuses_a_value_of_another_type(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_options(**{option: value})


def test_a_whole_number_may_have_an_exponent(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.toml", "[training]\ntraining_tokens = 1.28e9\nz_loss = 1e0")
    training = load_recipe(path).training
    assert training.training_tokens == 1_280_000_000
    assert isinstance(training.training_tokens, int)
    assert isinstance(training.z_loss, float)


def test_a_recipe_is_utf8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes("[logging]\nsample_prompt = 'é'".encode("utf-8-sig"))
    assert load_recipe(path).logging.sample_prompt == "é"
    path.write_bytes("[logging]\nsample_prompt = 'é'".encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe\.toml is not UTF-8 text: byte 27 is 0xe9"):
        load_recipe(path)


def test_a_run_folder_is_not_a_recipe(tmp_path: Path) -> None:
    write(tmp_path / "config.toml", "")
    with pytest.raises(ValueError, match=f"run folder, not a recipe; resume .*--resume {tmp_path}"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("training__seed", 2**63, "training.seed must be at most 9223372036854775807, and it is"),
        ("training__eval_interval", 10**400, "eval_interval must be at most .* about 10\\^400"),
        ("logging__sample_prompt", "caf\udce9", r"sample_prompt = 'caf\\udce9' is not valid UTF-8"),
        ("data__path", "a\0b", r"data.path = 'a\\x00b' contains a NUL character"),
    ],
)
def test_refuses_a_value_that_no_file_can_hold(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(with_options(**{option: value}))


def test_a_number_may_be_written_as_an_integer() -> None:
    assert with_options(optimizer__grad_clip=1).optimizer.grad_clip == 1


RANGES = {
    "at least 1": """
        model__vocab_size model__n_embd model__n_layers model__n_heads model__n_kv_heads
        model__multiple_of model__max_seq_len model__rope_original_max_seq_len
        model__rope_scaling_factor data__prefetch training__batch_size training__tokens_per_update
        training__training_tokens training__eval_tokens training__max_bad_updates
        parallel__replicate checkpoint__keep_last
        logging__log_interval logging__sample_growth logging__sample_tokens
    """,
    "greater than 0": """
        model__ffn_multiplier model__eps model__theta optimizer__max_lr optimizer__adam_eps
        parallel__timeout_minutes
    """,
    "0 or more": """
        optimizer__min_lr optimizer__weight_decay optimizer__warmup_iterations
        optimizer__grad_clip training__eval_interval training__seed training__max_wall_time
        training__spike_z_score training__z_loss
        checkpoint__interval_tokens checkpoint__keep_every_tokens logging__sample_interval
    """,
    "at least 0 and less than 1": """
        model__dropout optimizer__beta1 optimizer__beta2 optimizer__decay_fraction
        training__label_smoothing
    """,
}
NEAREST_OUTSIDE: dict[str, list[float]] = {
    "at least 1": [0],
    "greater than 0": [0],
    "0 or more": [-1],
    "at least 0 and less than 1": [-0.001, 1],
}


@pytest.mark.parametrize(
    ("option", "value", "wording"),
    [
        (option, value, wording)
        for wording, options in RANGES.items()
        for option in options.split()
        for value in NEAREST_OUTSIDE[wording]
    ],
)
def test_refuses_a_value_out_of_range(option: str, value: float, wording: str) -> None:
    name = option.replace("__", r"\.")
    with pytest.raises(ValueError, match=rf"{name} must be {wording}, not {value}\."):
        validate(with_options(**{option: value}))


NUMBERS = [
    f"{group}__{name}"
    for group, kind in typing.get_type_hints(Config).items()
    for name, hint in typing.get_type_hints(kind).items()
    if hint is float
]


def test_zero_turns_off_what_may_be_0() -> None:
    options = {option: 0 for option in RANGES["0 or more"].split()}
    validate(with_options(**options))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("option", NUMBERS)
def test_refuses_a_number_that_is_not_finite(option: str, value: float) -> None:
    # The scaling is on, since without it its two factors have no meaning.
    options = {"model__rope_scaling_factor": 8.0, option: value}
    with pytest.raises(ValueError, match=option.replace("__", r"\.")):
        validate(with_options(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__n_heads": 7}, r"n_heads = 7 does not divide model\.n_embd = 768"),
        ({"model__n_heads": 256}, r"model\.n_embd / model\.n_heads = 3 is odd"),
        ({"model__logit_softcap": 0.0}, r"logit_softcap must be greater than 0, not 0\.0"),
        ({"model__logit_softcap": float("inf")}, r"logit_softcap must be .*, not inf"),
        ({"model__n_kv_heads": 5}, r"n_kv_heads = 5 does not divide model\.n_heads = 12"),
        (
            {"model__rope_scaling_factor": 8.0, "model__rope_low_freq_factor": 4.0},
            r"rope_low_freq_factor = 4\.0 must be less than model\.rope_high_freq_factor = 4\.0",
        ),
        ({"optimizer__min_lr": 1.0}, r"min_lr = 1\.0 is greater than optimizer\.max_lr = 0\.0003"),
        ({"training__training_tokens": 2**19}, r"warmup_iterations = 100 leaves nothing of the 1 "),
        (
            {"training__batch_size": 3},
            r"= 524288 is not a multiple of .* = 3 x 1024 x 1 = 3072; .*: 525312\.",
        ),
    ],
)
def test_refuses_values_that_contradict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(with_options(**options))


def test_an_update_must_divide_among_the_devices() -> None:
    config = with_options(training__tokens_per_update=2**14)
    validate(config, world_size=4)
    with pytest.raises(ValueError, match=r"4 x 1024 x 8 = 32768; .*: 32768\."):
        validate(config, world_size=8)


def test_replicas_must_divide_the_processes() -> None:
    config = with_options(parallel__replicate=2)
    validate(config, world_size=8)
    with pytest.raises(ValueError, match=r"replicate = 2 does not divide the 3 processes"):
        validate(config, world_size=3)


@pytest.mark.parametrize("value", ["auto", True, False])
def test_resharding_is_a_choice_of_three(value: str | bool) -> None:
    config = with_options(parallel__reshard_after_forward=value)
    assert config.parallel.reshard_after_forward == value


@pytest.mark.parametrize(
    ("n_embd", "multiple_of", "multiplier", "ffn_hidden"),
    [
        (768, 256, 1.0, 2048),
        (2048, 256, 1.0, 5632),  # 8/3 of it is 5461.3
        (4096, 1024, 1.3, 14336),
        (48, 64, 1.0, 128),  # 8/3 of it is 128, a multiple already
    ],
)
def test_feed_forward_width(
    n_embd: int, multiple_of: int, multiplier: float, ffn_hidden: int
) -> None:
    model = ModelConfig(n_embd=n_embd, multiple_of=multiple_of, ffn_multiplier=multiplier)
    assert model.ffn_hidden == ffn_hidden


def test_what_follows_from_the_options() -> None:
    config = with_options(
        model__n_embd=64,
        model__n_heads=4,
        model__max_seq_len=16,
        training__batch_size=2,
        training__tokens_per_update=256,
        training__training_tokens=1025,
    )
    assert config.model.head_dim == 16
    assert config.model.kv_heads == 4
    assert with_options(model__n_kv_heads=2).model.kv_heads == 2
    assert config.sequences_per_update == 16
    assert [config.accumulation_steps(world_size) for world_size in (1, 2, 8)] == [8, 4, 1]
    # The last update covers the one token that is left over.
    assert config.n_updates == 5


def test_survives_a_dictionary() -> None:
    config = with_options(model__n_kv_heads=4, optimizer__schedule="wsd", data__path="somewhere")
    for wanted in (Config(), config):
        assert config_from_dict(wanted.to_dict(), source="test") == wanted
    assert "n_kv_heads" not in Config().to_dict()["model"]
