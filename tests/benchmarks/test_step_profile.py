"""Classification of kernels by name, and busy time."""

import gzip
import json
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.step_profile import (
    CLASSES,
    Launch,
    bound_by_class,
    busy_seconds,
    listing,
    operator_class,
    profile_shares,
    without_first,
    write_launches,
)
from fastllama.config import ModelConfig
from fastllama.planning.bound import DEVICE_RATES, bound


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("_add_rms_norm_bwd_kernel", "rms_norm"),
        ("_rope_inplace_kernel", "rope"),
        ("_swiglu_bwd_kernel", "swiglu"),
        ("_cross_entropy_fwd_kernel", "cross_entropy"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>",
            "optimizer",
        ),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("void at::native::elementwise_kernel<128, 4>(int, ...)", "elementwise"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16>", "attention"),
        ("void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*)", "embedding"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>", "embedding"),
        ("void at::native::detail::chunk_cat_cuda_kernel<float, float>", "copy"),
        ("triton_poi_fused_add_0", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "elementwise"),
        ("_unknown_kernel", "other"),
        ("aten::mm", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ],
)
def test_operator_class(kernel: str, name: str) -> None:
    assert operator_class(kernel) == name


def test_busy_seconds_count_overlap_once() -> None:
    launches = [Launch("b", 4.0, 6.0), Launch("a", 0.0, 3.0), Launch("c", 1.0, 2.0)]
    assert busy_seconds(launches) == 5.0
    assert busy_seconds([*launches, Launch("d", 5.0, 7.0)]) == 6.0


def test_first_update_is_left_out() -> None:
    """It waits for the host between its kernels; the seconds after its end count."""
    first = [Launch("_rope_", 0.0, 1.0), Launch("aten::mm", 3.0, 5.0)]
    second = [Launch("_rope_", 5.5, 6.5), Launch("aten::mm", 6.5, 8.5)]
    assert without_first([*second, *first], 2) == (second, 3.5)


def test_profile_shares() -> None:
    launches = [
        Launch("aten::mm", 0.0, 4.0),
        Launch("_rope_", 4.0, 5.0),
        Launch("_rope_", 8.0, 9.0),
    ]
    rows = profile_shares("tiny", launches, 10.0, 2, None, 100)
    found = {row.operator_class: (row.seconds, row.share, row.calls) for row in rows}
    assert found == {"matmul": (2.0, 0.4, 0), "rope": (1.0, 0.2, 1), "idle": (2.0, 0.4, 0)}
    assert [row.seconds for row in rows] == sorted((row.seconds for row in rows), reverse=True)


def test_listing_is_sorted_by_time() -> None:
    launches = [
        Launch("_rope_", 0.0, 1e-3),
        Launch("aten::mm", 1e-3, 5e-3),
        Launch("_rope_", 5e-3, 6e-3),
    ]
    _, first, second = listing(launches, n_updates=2).splitlines()
    assert first.split() == ["2.000", "0", "matmul", "aten::mm"]
    assert second.split() == ["1.000", "1", "rope", "_rope_"]


def test_launches_are_written_in_order(tmp_path: Path) -> None:
    launches = [Launch("late", 2.0, 2.5), Launch("early", 1.0, 1.000003)]
    write_launches(tmp_path / "launches.json.gz", launches)
    with gzip.open(tmp_path / "launches.json.gz", "rt") as stream:
        assert json.load(stream) == [["early", 1e6, 3.0], ["late", 2e6, 5e5]]


def test_bound_by_class_sums_to_bound() -> None:
    limit = bound(ModelConfig(), 2**16, DEVICE_RATES["H200"])
    allowed = bound_by_class(limit, 2**16)
    assert sum(allowed.values()) == pytest.approx(2**16 * limit.seconds_per_token)
    assert allowed.keys() <= CLASSES.keys()


@pytest.mark.parametrize("operator", ["rms_norm", "rope", "swiglu", "cross_entropy"])
def test_class_of_our_kernels(operator: str) -> None:
    module = import_module(f"fastllama_kernels.{operator}")
    kernels = [name for name in vars(module) if name.endswith("_kernel")]
    assert kernels
    assert {operator_class(name) for name in kernels} == {operator}
