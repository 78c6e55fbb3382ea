"""Which parameters weight decay applies to."""

import pytest

from tests.optim.test_clipping import build, is_decayed


@pytest.mark.parametrize("tied", [False, True])
def test_decays_matrices_and_not_norms_or_embeddings(tied: bool) -> None:
    model, optimizer = build(tied)
    groups = optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    # A tied output projection is the embedding.
    assert ("output.weight" in names) == (not tied)
    assert {name: decay[id(p)] for name, p in names.items()} == {
        name: 0.5 if is_decayed(name) else 0.0 for name in names
    }
