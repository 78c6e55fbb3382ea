"""AdamW: which parameters it decays."""

import pytest

from tests.optim.small_model import CONFIG, build, is_decayed


@pytest.mark.parametrize("tied", [False, True])
def test_decays_matrices_only(tied: bool) -> None:
    model, optimizer = build(tied)
    groups = optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    # A tied output projection is the embedding, which is not decayed.
    assert ("output.weight" in names) == (not tied)
    assert {name: decay[id(p)] for name, p in names.items()} == {
        name: CONFIG.weight_decay if is_decayed(name) else 0.0 for name in names
    }
