"""Classes of the operators of an update on a CPU."""

import pytest

from benchmarks.cpu_profile import operator_class


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::mm", "matmul"),
        ("aten::addmm", "matmul"),
        ("aten::bmm", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("graph_0_cpp_fused__softmax__to_copy_masked_fill_mul_2", "attention"),
        ("graph_1_cpp_fused__softmax_backward_data__to_copy_lt_masked_fill_5", "attention"),
        ("graph_0_cpp_fused__to_copy_amax_cat_eq_exp_gather_log_sub_sum_where_11", "loss"),
        ("aten::_log_softmax_backward_data", "loss"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::linalg_vector_norm", "optimizer"),
        ("aten::copy_", "copies"),
        ("graph_0_cpp_fused__to_copy_mul_silu_split_6", "elementwise"),
        ("aten::silu", "elementwise"),
        ("autograd::engine::evaluate_function: AddBackward0", None),
        ("Torch-Compiled Region: 0/0", None),
    ],
)
def test_operator_class(name: str, expected: str | None) -> None:
    assert operator_class(name) == expected
