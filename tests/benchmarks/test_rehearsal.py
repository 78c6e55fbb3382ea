"""The CUDA rehearsal: logs and checks, on calls that the tests write down."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.checks import launch_differences
from benchmarks.rehearsal import budgets, build, checks
from benchmarks.rehearsal.budgets import read_budget, write_budget
from benchmarks.rehearsal.case import RECIPES, Case, Measured, cases
from benchmarks.rehearsal.kernels import KERNELS, Shape, kernel_of, moved_bytes
from benchmarks.rehearsal.log import Call, launch_list, read_log, short_name
from benchmarks.rehearsal.peers import elementwise_bytes
from benchmarks.step_profile import Launch
from fastllama.planning.flops import matmul_parameters
from fastllama.planning.memory import plan_traffic

STREAMS = {"(nil)": "compute", "0x10": "loader", "0x20": "gather"}
MAIN, LOADER = "1", "2"


def call(kind: str, name: str, thread: str = MAIN, stream: str = "(nil)", **values: object) -> Call:
    return Call(kind, name, thread, stream, {key: str(value) for key, value in values.items()})


def matmul(m: int, n: int, k: int, *, c: int = 14, beta: int = 0) -> Call:
    return call("matmul", "GemmEx", m=m, n=n, k=k, batch=1, a=14, b=14, c=c, beta=beta)


def load(copied: str, used: str) -> list[Call]:
    """What the loader's thread does for a batch."""
    return [
        call("sync", "cudaEventSynchronize", LOADER, event=copied),
        call("wait", "event", LOADER, "0x10", event=used),
        call("memcpy", "H2D", LOADER, "0x10", bytes=64),
        call("record", "event", LOADER, "0x10", event=copied),
    ]


def use(copied: str, used: str) -> list[Call]:
    """What training does for a batch."""
    return [call("wait", "event", event=copied), call("record", "event", event=used)]


def found(sentences: Iterable[str]) -> str:
    return "; ".join(sentences)


NAMES = {
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, "
    "std::array<char*, 1ul>, false>(int, at::native::FillFunctor<float>, std::array<char*, 1ul>)": (
        "vectorized_elementwise_kernel<FillFunctor, float>"
    ),
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, "
    "float, float, float>, unsigned int, float, 4, 4> >(at::native::ReduceOp<long> )": (
        "reduce_kernel<ReduceOp, MeanOps, float, int>"
    ),
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, "
    "cutlass::bfloat16_t> >(pytorch_flash::Flash_fwd_params)": "flash_fwd_kernel",
    "at::native::(anonymous namespace)::indexSelect(float*, long)": "indexSelect",
}


@pytest.mark.parametrize("declaration", NAMES)
def test_short_names_say_what_a_kernel_does(declaration: str) -> None:
    assert short_name(declaration) == NAMES[declaration]


def test_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "update.log"
    log.write_text(
        "kernel\t_Z3addPf\t7\t(nil)\tgrid=2 block=128\n"
        "matmul\tGemmEx\t7\t(nil)\tm=3 n=5 k=4 batch=1 a=14 b=14 c=0 beta=1\n"
        "collective\tAllGather\t7\t0x20\tcount=6 type=9\n"
        "memcpy\tH2D\t8\t0x10\tbytes=64\n"
        "sync\tcudaDeviceSynchronize\t7\t(nil)\t\n"
    )
    calls = read_log(log)
    assert [c.title for c in calls] == [
        "add",
        "matmul 5x4x3 bf16 -> f32, added",
        "AllGather 6 bf16",
        "H2D 64 bytes",
        "cudaDeviceSynchronize",
    ]
    # A wait is no launch, and how far the loader has come is up to its thread.
    assert launch_list(calls, STREAMS) == {
        "add": 1,
        "matmul 5x4x3 bf16 -> f32, added": 1,
        "AllGather 6 bf16 on gather": 1,
    }


def test_host_that_waits_is_found() -> None:
    ring = load("c", "u")
    assert not found(checks.waits([*ring, *use("c", "u")], STREAMS))
    wait = call("sync", "cudaStreamSynchronize")
    assert found(checks.waits([*ring, wait], STREAMS)) == (
        "the host waits for the device: 1 x cudaStreamSynchronize"
    )
    read = call("memcpy", "D2H", bytes=4)
    assert "reads from the device: 1 copies, D2H 4 bytes" in found(checks.waits([read], STREAMS))
    malloc = call("malloc", "cudaMalloc", bytes=512)
    assert "takes memory from the device 1 times" in found(checks.waits([malloc], STREAMS))


def test_order_on_the_ring_is_checked() -> None:
    first, second = [*load("c", "u"), *use("c", "u")], [*load("d", "v"), *use("d", "v")]
    assert not found(checks.ring([*first, *second], STREAMS))
    copies = load("c", "u")
    unordered = [copies[0], *copies[2:], *use("c", "u")]
    assert "does not wait until training" in found(checks.ring(unordered, STREAMS))
    unmarked = [*copies[:3], copies[0], *use("c", "u")]
    assert "is not followed by an event" in found(checks.ring(unmarked, STREAMS))
    assert "does not wait for the loader's copies" in found(checks.ring([*copies], STREAMS))
    unfreed = [*copies, call("wait", "event", event="c")]
    assert "does not say when a buffer is free" in found(checks.ring(unfreed, STREAMS))


def test_memory_is_compared_with_the_plan() -> None:
    good = Measured(0.1, 1000, 1150, 0, 1005, {}, STREAMS)
    assert not found(checks.memory(good, in_reduction=50))
    for changes, problem in (
        ({"peak_bytes": 1020}, "+1.5% from the plan"),
        ({"peak_bytes": 990}, "-1.5% from the plan"),
        ({"reserved_bytes": 1170}, "the allocator reserves"),
        ({"allocator_retries": 2}, "tries again: 2 times"),
    ):
        assert problem in found(
            checks.memory(dataclasses.replace(good, **changes), in_reduction=50)
        )


def test_matmuls_have_the_flops_of_the_model() -> None:
    config = Case("llama-100m", 1, compiled=False).config()
    tokens = config.training.tokens_per_update
    # As many multiplications in one product as in all of the model's.
    whole = matmul(3 * tokens, matmul_parameters(config.model), 1)
    assert not found(checks.matmuls(config, [whole]))
    assert "the matmuls have" in found(checks.matmuls(config, [whole, matmul(1, 1, 1)]))


def test_collectives_send_what_is_planned() -> None:
    config = Case("llama-100m", 8, True, {"parallel.reshard_after_forward": False}).config()
    plan = plan_traffic(config, 8)
    gather = call("collective", "AllGather", stream="0x20", count=plan.all_gather // 14, type=9)
    reduce = call("collective", "ReduceScatter", count=plan.reduce_scatter // 28, type=7)
    assert not found(checks.traffic(config, 8, [gather, reduce]))
    twice = found(checks.traffic(config, 8, [gather, gather, reduce]))
    assert re.fullmatch(r"AllGather sends .* GB, and the plan is .* GB", twice)
    assert found(checks.streams([gather], STREAMS)) == ""
    assert "ReduceScatter" in found(checks.streams([reduce], STREAMS))


def test_launches_are_those_of_the_budget() -> None:
    assert not found(checks.launches(Counter(a=2, b=1), {"a": 2, "b": 1}))
    differences = found(checks.launches(Counter(a=3, c=1), {"a": 2, "b": 1}))
    assert differences == (
        "3 launches instead of 2: a; 0 launches instead of 1: b; 1 launches instead of 0: c"
    )


def test_profile_of_a_gpu_is_compared_with_the_budget() -> None:
    name = next(iter(NAMES))
    profile = [
        Launch(name, 0, 1),
        Launch("_rope_kernel", 1, 2),
        Launch("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_NNT", 2, 3),
        Launch("Memcpy DtoD (Device -> Device)", 3, 4),
    ]
    budget = {NAMES[name]: 1, "_rope_kernel": 2, "matmul 2x3x4 bf16 -> bf16": 1, "D2D 8 bytes": 3}
    assert launch_differences(profile, budget) == ["1 launches instead of 2: _rope_kernel"]


def test_budget_is_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "FOLDER", tmp_path / "budgets")
    assert read_budget("r") == {}
    write_budget("r", {"1 rank, eager": Counter({"a<b, c>": 2, "d": 3})})
    write_budget("r", {"1 rank, eager, option": Counter({"d": 3, "e": 1})})
    assert read_budget("r") == {
        "1 rank, eager": {"d": 3, "a<b, c>": 2},
        "1 rank, eager, option": {"d": 3, "e": 1},
    }
    # An option's list has only what it changes.
    assert (
        (tmp_path / "budgets" / "r.toml")
        .read_text()
        .endswith('["1 rank, eager, option"]\n"e" = 1\n"a<b, c>" = 0\n')
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_case_has_a_budget_of_known_kernels(recipe: str) -> None:
    budget = read_budget(recipe)
    assert {case.name for case in cases(every=True) if case.recipe == recipe} == budget.keys()
    patterns = "|".join(kernel.pattern for kernel in KERNELS)
    unknown = {name for launches in budget.values() for name in launches}
    assert not {name for name in unknown if not re.match(patterns, name)}


def test_large_launch_is_not_taken_for_a_few_numbers() -> None:
    small = call("kernel", "elementwise_kernel<MulFunctor, float>", grid=2)
    large = call("kernel", "elementwise_kernel<MulFunctor, float>", grid=2000)
    assert kernel_of(small) is not None
    assert kernel_of(large) is None


def test_bytes_are_those_of_the_operators() -> None:
    config = Case("llama-1b", 1, compiled=True).config()
    s = Shape.of(config, 1)
    assert (s.N, s.D, s.F, s.V, s.H, s.G, s.K, s.b) == (32_768, 2048, 5632, 8192, 32, 32, 64, 2)
    calls = [
        call("triton", "_swiglu_fwd_kernel", grid=1),
        call("triton", "_cross_entropy_fwd_kernel", grid=132),
        call("kernel", "vectorized_elementwise_kernel<FillFunctor, float>", grid=3),
        # AdamW is counted once, however many launches it takes.
        call("kernel", "multi_tensor_apply_kernel<FusedOptimizer", grid=9),
        call("kernel", "multi_tensor_apply_kernel<FusedOptimizer", grid=9),
        matmul(10, 20, 30, c=0, beta=1),
        call("sync", "cudaStreamSynchronize"),
    ]
    assert moved_bytes(calls, config, 1) == {
        "swiglu": 3 * 32_768 * 5632 * 2,
        "cross_entropy": 2 * 8192 * 8192 * 2,
        "accumulation": 3 * 1024 * 4,
        "optimizer": 28 * s.n_shard,
        "matmul": (10 * 30 + 20 * 30) * 2 + 2 * 10 * 20 * 4,
    }


def test_bytes_of_elementwise_kernels_of_peers() -> None:
    def kernel(declaration: str) -> Call:
        return Call("kernel", short_name(declaration), MAIN, "(nil)", {"grid": "7"}, declaration)

    loop = "void vectorized_elementwise_kernel<8, "
    add = kernel(f"{loop}CUDAFunctor_add<BFloat16>, std::array<char*, 3ul>>()")
    assert elementwise_bytes(add) == 7 * 1024 * 3 * 2
    lambda_ = "bfloat16_copy_kernel_cuda(x)::{lambda(float)#1}"
    cast = kernel(f"{loop}{lambda_}, std::array<char*, 2ul>>()")
    assert elementwise_bytes(cast) == 7 * 1024 * 6
    assert elementwise_bytes(kernel("void flash_fwd_kernel<float>()")) is None


def test_functions_of_the_driver_are_found(tmp_path: Path) -> None:
    header = tmp_path / "cuda.h"
    header.write_text(
        "#define cuMemAlloc cuMemAlloc_v2\n"
        "#define cuLaunch __CUDA_API_PTSZ(cuLaunch)\n"
        "CUresult CUDAAPI cuInit(unsigned int Flags);\n"
        "CUresult CUDAAPI cuMemAlloc(CUdeviceptr *dptr, size_t bytesize);\n"
    )
    assert build.driver_functions(header) == {"cuInit", "cuMemAlloc", "cuMemAlloc_v2"}


def test_missing_command_is_named() -> None:
    with pytest.raises(RuntimeError, match="no-such-gcc is missing; install gcc and binutils"):
        build.run(["no-such-gcc"])
    with pytest.raises(RuntimeError, match="false failed"):
        build.run(["false"])
