"""Rules: ranges of values, and values that contradict each other."""

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastllama.config import (
    Config,
    DataSource,
    Stage,
    ValidationSet,
    config_from_dict,
    load_recipe,
    validate,
)
from tests.config.with_options import with_options

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
# An update of the quickstart is one micro-batch.
WORLD_SIZES = {f"quickstart{suffix}": (1,) for suffix in ("", "-wsd", "-continued")}


def test_defaults_are_valid() -> None:
    validate(Config())
    assert config_from_dict({}, source="test") == Config()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(recipe: Path) -> None:
    for world_size in WORLD_SIZES.get(recipe.stem, (1, 8)):
        validate(load_recipe(recipe), world_size)


def test_processes_without_a_micro_batch_each_are_told_the_size_that_fits() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "configs" / "quickstart.toml")
    with pytest.raises(ValueError, match=r"the nearest that is: 4096, or set .*batch_size = 4\.$"):
        validate(recipe, world_size=2)
    # 2,048 tokens are not a number of sequences for 3.
    with pytest.raises(ValueError, match=r"the nearest that is: 6144\.$"):
        validate(recipe, world_size=3)


def test_a_huge_micro_batch_is_told_the_size_that_fits_at_once() -> None:
    config = with_options(
        training__batch_size=2**31,
        training__tokens_per_update=2**40,
        training__training_tokens=2**50,
    )
    with pytest.raises(ValueError, match=r"set training\.batch_size = 1073741824\.$"):
        validate(config)


RANGES = {
    "at least 1": """
        model__vocab_size model__n_embd model__n_layers model__n_heads model__n_kv_heads
        model__head_dim model__ffn_hidden model__multiple_of model__max_seq_len
        model__rope_original_max_seq_len
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
        training__label_smoothing training__ema_decay
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
def test_value_out_of_range_is_an_error(option: str, value: float, wording: str) -> None:
    name = option.replace("__", r"\.")
    with pytest.raises(ValueError, match=rf"{name} must be {wording}, not {value}\."):
        validate(with_options(**{option: value}))


FLOATS = [
    f"{group}__{name}"
    for group, kind in typing.get_type_hints(Config).items()
    for name, hint in typing.get_type_hints(kind).items()
    if hint is float
]


def test_zero_is_in_range() -> None:
    options = {option: 0 for option in RANGES["0 or more"].split()}
    validate(with_options(**options))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("option", FLOATS)
def test_nonfinite_number_is_an_error(option: str, value: float) -> None:
    # With scaling, because its two factors are checked against each other only then.
    options = {"model__rope_scaling_factor": 8.0, option: value}
    with pytest.raises(ValueError, match=option.replace("__", r"\.")):
        validate(with_options(**options))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("training__seed", 2**63, "training.seed must be at most 9223372036854775807, and it is"),
        ("training__eval_interval", 10**400, "eval_interval must be at most .* about 10\\^400"),
        ("logging__sample_prompt", "caf\udce9", r"sample_prompt = 'caf\\udce9' is not valid UTF-8"),
        ("parallel__timeout_minutes", 1e12, "timeout_minutes must be at most 525,600, not 1"),
        ("model__ffn_multiplier", 1e308, r"ffn_multiplier must be at most 1,000, not 1e\+308"),
        ("model__logit_softcap", 1e39, r"logit_softcap must be at most 1,000,000,000"),
        ("data__prefetch", 10**18, r"data.prefetch must be at most 1,000, not 10"),
        ("checkpoint__upload", "://x", r"checkpoint.upload = '://x' is not a URL"),
        ("data__path", "a\0b", r"data.path = 'a\\x00b' contains a NUL character"),
    ],
)
def test_unrepresentable_value_is_an_error(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(with_options(**{option: value}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__n_heads": 7}, r"n_heads = 7 does not divide model\.n_embd = 768"),
        ({"model__n_heads": 256}, r"model\.n_embd / model\.n_heads = 3 is odd"),
        ({"model__head_dim": 5}, r"model\.head_dim = 5 is odd"),
        (
            {"model__ffn_hidden": 512, "model__ffn_multiplier": 1.5},
            r"ffn_hidden = 512 is .*, and model\.ffn_multiplier = 1\.5 would choose it",
        ),
        ({"model__logit_softcap": 0.0}, r"logit_softcap must be greater than 0, not 0\.0"),
        ({"model__logit_softcap": float("inf")}, r"logit_softcap must be .*, not inf"),
        ({"model__n_kv_heads": 5}, r"n_kv_heads = 5 does not divide model\.n_heads = 12"),
        (
            {"model__rope_scaling_factor": 8.0, "model__rope_low_freq_factor": 4.0},
            r"rope_low_freq_factor = 4\.0 must be less than model\.rope_high_freq_factor = 4\.0",
        ),
        (
            {
                "training__save_projection_inputs": True,
                "training__activation_checkpointing": "full",
            },
            r'what training\.activation_checkpointing = "full" recomputes; give one of the two',
        ),
        ({"training__init_moments": True}, r"of training\.init_from, which is empty; give both"),
        ({"optimizer__min_lr": 1.0}, r"min_lr = 1\.0 is greater than optimizer\.max_lr = 0\.0003"),
        ({"training__training_tokens": 2**19}, r"warmup_iterations = 100 leaves nothing of the 1 "),
        (
            {"training__batch_size": 6},
            r"= 524288 is not a multiple of .* = 6 x 1024 x 1 = 6144; .*: 522240, "
            r"or set training.batch_size = 2\.",
        ),
    ],
)
def test_contradicting_values_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(with_options(**options))


def test_tokens_per_update_must_be_a_multiple_of_all_micro_batches() -> None:
    config = with_options(training__tokens_per_update=2**14)
    validate(config, world_size=4)
    with pytest.raises(
        ValueError, match=r"4 x 1024 x 8 = 32768; .*: 32768, or set training.batch_size = 2\."
    ):
        validate(config, world_size=8)


def test_replicas_must_divide_the_processes() -> None:
    config = with_options(parallel__replicate=2)
    validate(config, world_size=8)
    with pytest.raises(ValueError, match=r"replicate = 2 does not divide the 3 processes"):
        validate(config, world_size=3)


def mixed(**options: Any) -> Config:
    """Two sources, 3 updates of 2^19 tokens, and the given options of `data`."""
    sources = (DataSource("a/web"), DataSource("a/code"))
    config = with_options(training__training_tokens=3 * 2**19, optimizer__warmup_iterations=0)
    return replace(config, data=replace(config.data, **{"sources": sources, **options}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "a"}, r"data\.path = a names one data folder and data\.sources several"),
        ({"sources": (DataSource(),)}, r"data\.sources\.0\.path is empty; give the folder"),
        ({"validation": (ValidationSet(),)}, r"data\.validation\.0\.path is empty"),
        (
            {"sources": (DataSource("a", weight=-1),)},
            r"sources\.0\.weight must be 0 or more, not -1",
        ),
        (
            {"sources": (DataSource("a", weight=float("nan")),)},
            r"sources\.0\.weight must be 0 or more, not nan",
        ),
        (
            {"sources": (DataSource("a", max_epochs=-2.0),)},
            r"sources\.0\.max_epochs must be 0 or more, not -2",
        ),
        (
            {"sources": (DataSource("a", weight=0), DataSource("b", weight=0))},
            r"All weights of data\.sources are 0",
        ),
        (
            {"sources": (DataSource("a/x"), DataSource("b/x/"))},
            r"data\.sources\.1 and data\.sources\.0 are both named x; give data\.sources\.1\.name",
        ),
        (
            {"validation": (ValidationSet("a/x"), ValidationSet("b", name="x"))},
            r"data\.validation\.1 and data\.validation\.0 are both named x",
        ),
        (
            {"sources": (DataSource("a/x,y"),)},
            r"data\.sources\.0\.name = 'x,y' cannot be the name of a column; give a name",
        ),
        ({"sources": (DataSource("a\0"),)}, r"data\.sources\.0\.path = .* contains a NUL"),
        (
            {"stages": (Stage(),)},
            r"stages\.0\.start_tokens is 0 or missing; give the tokens",
        ),
        (
            {"stages": (Stage(-1),)},
            r"stages\.0\.start_tokens = -1 is not after the first update of the run",
        ),
        (
            {"stages": (Stage(2**19), Stage(2**19))},
            r"stages\.1\.start_tokens = 524288 is not after the first update of data\.stages\.0",
        ),
        (
            {"stages": (Stage(3 * 2**19),)},
            r"start_tokens = 1572864 begins after the last update, 3 of 524288",
        ),
        (
            {"stages": (Stage(2**19, weights=(1.0,)),)},
            r"stages\.0\.weights has 1 numbers, and there are 2 data\.sources",
        ),
        (
            {"stages": (Stage(2**19, weights=(1.0, -1.0)),)},
            r"stages\.0\.weights must be 0 or more, not -1\.0",
        ),
        (
            {"stages": (Stage(2**19, weights=(0.0, 0.0)),)},
            r"All weights of data\.stages\.0\.weights are 0",
        ),
        ({"stages": (Stage(2**19, theta=0.0),)}, r"stages\.0\.theta must be greater than 0, not 0"),
        ({"stages": (Stage(2**19, batch_size=0),)}, r"stages\.0\.batch_size must be at least 1"),
        (
            {"stages": (Stage(2**19, max_seq_len=1536),)},
            r"stages\.0\.max_seq_len = 1536 is not .* model\.max_seq_len = 1024; .* that is: 2048",
        ),
        (
            {"stages": (Stage(2**19, max_seq_len=768), Stage(2**20, max_seq_len=1024))},
            r"data\.stages\.0 trains on sequences of 768 tokens, which do not divide .*, 1024",
        ),
        (
            {"stages": (Stage(2**19, batch_size=3),)},
            r"a multiple of .* of data\.stages\.0 = 3 x 1024 x 1 .*: \d+, or set data\.stages\.0",
        ),
    ],
)
def test_mixture_that_cannot_work_is_an_error(options: dict[str, Any], message: str) -> None:
    validate(mixed())
    with pytest.raises(ValueError, match=message):
        validate(mixed(**options))


def test_stages_apply_one_after_the_other() -> None:
    stages = (Stage(1, max_seq_len=4096, batch_size=1), Stage(2**20, theta=5e5, weights=(1.0, 3.0)))
    config = mixed(stages=stages)
    validate(config)
    # The first stage begins with the second update, the next whole one.
    assert [config.first_step(stage) for stage in stages] == [2, 3]
    assert [config.last_step(step) for step in (1, 2, 3)] == [1, 2, 3]
    trained = [config.at(step) for step in (0, 1, 2, 3, 4)]
    assert [each.model.max_seq_len for each in trained] == [1024, 1024, 4096, 4096, 4096]
    assert [each.model.theta for each in trained] == [1e4, 1e4, 1e4, 5e5, 5e5]
    assert [each.training.batch_size for each in trained] == [4, 4, 1, 1, 1]
    assert config.stages == [config, trained[2], trained[3]]
    assert (config.longest_seq_len, config.positions_per_update) == (4096, 128)
