"""What must hold of an update: found in its log, and in what PyTorch says of it."""

from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks.rehearsal.case import MICRO_BATCHES, Case, Measured
from benchmarks.rehearsal.kernels import kernel_of
from benchmarks.rehearsal.log import NCCL_TYPES, WIDTHS, Call, launch_list
from fastllama.config import Config
from fastllama.planning.flops import matmul_parameters, n_block_parameters, n_parameters
from fastllama.planning.memory import plan_traffic

PEAK_MARGIN = 0.01
"""How far the peak of the allocator may be from the plan."""
RESERVED_MARGIN = 1 / 0.9 - 1
"""How much more than its peak, and the gradients in reduction, the allocator may take from the
device: buffers of different streams do not share memory. The memory plan leaves a tenth of
the device for this."""


def failures(
    case: Case, config: Config, measured: Measured, calls: Sequence[Call], budget: dict[str, int]
) -> Iterator[str]:
    """One sentence for everything that is not as designed.

    `config` is the resolved one of the run.
    """
    yield from waits(calls, measured.streams)
    yield from memory(measured, reduction_bytes(config, case.ranks))
    yield from ring(calls, measured.streams)
    yield from traffic(config, case.ranks, calls)
    yield from matmuls(config, calls)
    yield from streams(calls, measured.streams)
    yield from launches(launch_list(calls, measured.streams), budget)
    unknown = {call.title for call in calls if call.runs_on_device and kernel_of(call) is None}
    for title in sorted(unknown):
        yield f"nobody has given a reason for {title}"


def loader_thread(calls: Sequence[Call], streams: dict[str, str]) -> str | None:
    """The thread that copies batches to the device, if it did so in the log."""
    copies = (call.thread for call in calls if streams.get(call.stream) == "loader")
    return next(copies, None)


def waits(calls: Sequence[Call], streams: dict[str, str]) -> Iterator[str]:
    """The host waits for the device, reads from it, or asks it for memory."""
    # Before it fills a buffer again, the loader's own thread waits for the copy out of it.
    loader = loader_thread(calls, streams)
    syncs = Counter(call.name for call in calls if call.kind == "sync" and call.thread != loader)
    for name, count in syncs.items():
        yield f"the host waits for the device: {count} x {name}"
    copies = [call for call in calls if call.kind == "memcpy" and call.name == "D2H"]
    if copies:
        yield f"the host reads from the device: {len(copies)} copies, {copies[0].title}"
    if count := sum(call.kind == "malloc" for call in calls):
        yield f"the allocator takes memory from the device {count} times"


def reduction_bytes(config: Config, n_ranks: int) -> int:
    """Bytes of reduced gradients, and of the largest group in reduction."""
    model, parallel = config.model, config.parallel
    n_shard = n_parameters(model) * parallel.replicate // n_ranks
    n_largest = max(n_block_parameters(model), model.vocab_size * model.n_embd)
    return 4 * n_shard + (4 if parallel.reduce_dtype == "float32" else 2) * n_largest


def memory(measured: Measured, in_reduction: int) -> Iterator[str]:
    """The allocator holds what the plan says, and takes little more from the device.

    `in_reduction` are bytes that come when the activations have gone, but on another stream, so
    they do not take the memory of the activations.
    """
    difference = measured.peak_bytes / measured.planned_bytes - 1
    if abs(difference) > PEAK_MARGIN:
        yield (
            f"the peak is {gib(measured.peak_bytes)}, {difference:+.1%} from the plan of "
            f"{gib(measured.planned_bytes)}"
        )
    if measured.reserved_bytes > (1 + RESERVED_MARGIN) * measured.peak_bytes + in_reduction:
        yield (
            f"the allocator reserves {gib(measured.reserved_bytes)} for a peak of "
            f"{gib(measured.peak_bytes)}"
        )
    if measured.allocator_retries:
        yield f"the allocator runs out and tries again: {measured.allocator_retries} times"


def gib(n_bytes: float) -> str:
    """Bytes in GiB."""
    return f"{n_bytes / 2**30:.2f} GiB"


def ring(calls: Sequence[Call], streams: dict[str, str]) -> Iterator[str]:
    """The order on the loader's ring, as `fastllama/data/loader.py` states it."""
    loader = loader_thread(calls, streams)
    own = [call for call in calls if call.thread == loader and loader is not None]
    on_compute = [call for call in calls if streams.get(call.stream) == "compute"]
    copied, used = set(), set()
    for index, call in enumerate(own):
        if call.kind != "memcpy":
            continue
        around = own[max(0, index - 1) : index + 2]
        # The log may begin or end between them.
        if index and around[0].kind != "wait":
            yield "a copy of the loader does not wait until training has used the buffer"
        elif index:
            used.add(around[0].values["event"])
        if len(around) == 3 and around[2].kind != "record":
            yield "a copy of the loader is not followed by an event"
        elif len(around) == 3:
            copied.add(around[2].values["event"])
    waited = [c for c in on_compute if c.kind == "wait" and c.values["event"] in copied]
    recorded = [c for c in on_compute if c.kind == "record" and c.values["event"] in used]
    for what, found in (("waits for copies", waited), ("says that buffers are free", recorded)):
        if own and len(found) > MICRO_BATCHES:
            yield f"training {what} {len(found)} times, for {MICRO_BATCHES} micro-batches"
    if own and not waited:
        yield "training does not wait for the loader's copies"
    if own and not recorded:
        yield "training does not say when a buffer is free"


def traffic(config: Config, n_ranks: int, calls: Sequence[Call]) -> Iterator[str]:
    """The bytes of the collectives are those of the plan."""
    replicas = config.parallel.replicate
    shards = n_ranks // replicas
    plan = plan_traffic(config, n_ranks)
    sent: Counter[str] = Counter()
    for call in calls:
        if call.kind == "collective":
            size = call.number("count") * WIDTHS[NCCL_TYPES[call.number("type")]]
            sent[call.name] += size
    counted = {
        "AllGather": (sent["AllGather"] * (shards - 1), plan.all_gather),
        "ReduceScatter": (sent["ReduceScatter"] * (shards - 1), plan.reduce_scatter),
        "AllReduce": (2 * sent["AllReduce"] * (replicas - 1) // replicas, plan.all_reduce),
    }
    for name, (found, planned) in counted.items():
        # FSDP2 pads shards to equal sizes, and scalars are reduced as well.
        if abs(found - planned) > 0.01 * planned + 4096:
            yield f"{name} sends {found / 1e9:.3f} GB, and the plan is {planned / 1e9:.3f} GB"


def matmuls(config: Config, calls: Sequence[Call]) -> Iterator[str]:
    """Without recomputation, 6 FLOPs for each token and each weight of a projection."""
    if config.training.activation_checkpointing != "none":
        return
    tokens = MICRO_BATCHES * config.training.batch_size * config.model.max_seq_len
    expected = 6 * tokens * matmul_parameters(config.model)
    found = sum(flops(call) for call in calls if call.kind == "matmul")
    if found != expected:
        yield f"the matmuls have {found:.4g} FLOPs, and the model needs {expected:.4g}"


def flops(call: Call) -> int:
    """FLOPs of a matmul."""
    m, n, k, batch = (call.number(key) for key in ("m", "n", "k", "batch"))
    return 2 * m * n * k * batch


def streams(calls: Sequence[Call], names: dict[str, str]) -> Iterator[str]:
    """FSDP2's collectives are not on the stream that computes."""
    for call in calls:
        stream = names.get(call.stream, "nccl")
        if call.name in ("AllGather", "ReduceScatter") and stream == "compute":
            yield f"{call.title} is on the stream that computes"


def launches(found: Counter[str], budget: dict[str, int]) -> Iterator[str]:
    """The launches are those of the budget."""
    for name in sorted(found.keys() | budget.keys()):
        if found[name] != budget.get(name, 0):
            yield f"{found[name]} launches instead of {budget.get(name, 0)}: {name}"
