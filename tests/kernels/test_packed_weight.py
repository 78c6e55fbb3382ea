"""`linear` and `linear_add` with a weight in the order of oneDNN."""

import pytest
import torch

from fastllama_kernels import can_pack, linear, linear_add, pack_weight
from tests.compare import assert_as_exact_as, randn

PACKED = [
    dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(torch.empty(1, 1, dtype=dtype))
]


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("features", [(64, 48), (17, 33), (1, 7)], ids=str)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 5), (3, 1, 40)], ids=str)
def test_packed_weight_gives_the_same_product(
    rows: tuple[int, ...], features: tuple[int, int], dtype: torch.dtype
) -> None:
    n_in, n_out = features
    weight = randn(n_out, n_in, seed=0, dtype=dtype, device="cpu")
    # Rows that are apart in memory, as those of a packed projection are.
    x = randn(*rows, 2 * n_in, seed=1, dtype=dtype, device="cpu")[..., :n_in]
    before = weight.clone()
    packed = pack_weight(weight)
    assert torch.equal(weight, before)
    plain, truth = linear(x, weight), linear(x.double(), weight.double())
    assert_as_exact_as(linear(x, packed), plain, truth)
    addend = randn(*plain.shape, seed=2, dtype=dtype, device="cpu")
    expected = addend + plain, addend.double() + truth
    assert_as_exact_as(linear_add(x, packed, addend), *expected)


@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.float64, "cpu"), (torch.float16, "cpu"), (torch.bfloat16, "meta")],
)
def test_other_weights_are_not_packed(dtype: torch.dtype, device: str) -> None:
    assert not can_pack(torch.empty(2, 2, dtype=dtype, device=device))


def test_nothing_is_packed_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(torch.empty(2, 2))
