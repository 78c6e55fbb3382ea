"""The log of a null device: what an update has asked the device to do."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LAUNCHES = ("kernel", "triton", "matmul", "memset")
"""What runs on the device and takes its time, apart from copies and collectives."""
CUDA_TYPES = {0: "f32", 1: "f64", 2: "f16", 14: "bf16"}
NCCL_TYPES = {
    0: "int8",
    1: "uint8",
    2: "int32",
    4: "int64",
    6: "f16",
    7: "f32",
    8: "f64",
    9: "bf16",
}
WIDTHS = {"int8": 1, "uint8": 1, "f16": 2, "bf16": 2, "int32": 4, "f32": 4, "f64": 8, "int64": 8}
"""Bytes of an element."""


@dataclass(frozen=True)
class Call:
    """One call that reached the device."""

    kind: str
    """kernel, triton, matmul, memset, memcpy, collective, malloc, record, wait or sync."""
    name: str
    """Of a kernel, its template with the arguments that say what it does."""
    thread: str
    """Which thread of the host asked for it."""
    stream: str
    values: dict[str, str]
    declaration: str = ""
    """The whole declaration of a C++ kernel, with its template."""

    def number(self, key: str) -> int:
        """A value as an integer."""
        return int(self.values[key])

    @property
    def runs_on_device(self) -> bool:
        """Whether it is a launch, a copy or a collective."""
        return self.kind in (*LAUNCHES, "memcpy", "collective")

    @property
    def name_or_kind(self) -> str:
        """The name; of a matmul its kind, whatever function of cuBLAS computes it."""
        return self.kind if self.kind == "matmul" else self.name

    @property
    def title(self) -> str:
        """The name in a launch list: a matmul or a collective with its shape and types."""
        if self.kind == "matmul":
            types = [CUDA_TYPES[self.number(key)] for key in "abc"]
            # Row-major, as in the model: cuBLAS sees the transposes.
            batch = f"{self.values['batch']} x " if self.values["batch"] != "1" else ""
            shape = "x".join(self.values[key] for key in "nkm")
            adds = ", added" if self.values["beta"] != "0" else ""
            return f"matmul {batch}{shape} {types[0]} -> {types[2]}{adds}"
        if self.kind == "collective":
            return f"{self.name} {self.values['count']} {NCCL_TYPES[self.number('type')]}"
        if self.kind in ("memcpy", "memset"):
            return f"{self.name} {self.values['bytes']} bytes"
        return self.name


def read_log(path: Path) -> list[Call]:
    """All calls, in order, with the readable names of C++ kernels.

    Raises:
        RuntimeError: c++filt is missing.
    """
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    mangled = sorted({name for kind, name, *_ in lines if kind == "kernel"})
    declarations = dict(zip(mangled, demangle(mangled), strict=True))
    names = {name: short_name(text) for name, text in declarations.items()}
    return [
        Call(
            kind,
            names.get(name, name),
            thread,
            stream,
            dict(value.split("=", 1) for value in values.split()),
            declarations.get(name, "") if kind == "kernel" else "",
        )
        for kind, name, thread, stream, values in lines
    ]


def demangle(names: list[str]) -> list[str]:
    """C++ declarations of mangled names."""
    try:
        done = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise RuntimeError("c++filt is missing; install binutils") from None
    return done.stdout.splitlines()


_NAMESPACES = re.compile(
    r"\(anonymous namespace\)::|\b(CUB|THRUST)_\w+::"
    r"|\b(at|native|c10|std|detail|internal|cuda|cub|thrust|pytorch_flash)::"
)
_FUNCTORS = re.compile(r"\b(\w*(?:[Ff]unctor|_kernel_cuda|Ops?|Metadata|MeanOps|NormOps)\w*)\b")
_TYPES = re.compile(r"\b(float|double|long|int|bool|BFloat16|Half|__nv_bfloat16)\b")


def short_name(declaration: str) -> str:
    """A kernel's name with its functors and element types, without the rest of its template."""
    text = _NAMESPACES.sub("", declaration.removeprefix("void "))
    name, _, arguments = text.partition("<")
    name = re.sub(r"\(.*", "", name)
    # Only of the template: what follows are the parameters of the function.
    template = arguments[: _template_end(arguments)]
    parts = list(dict.fromkeys(_FUNCTORS.findall(template)))[:2]
    parts += list(dict.fromkeys(_TYPES.findall(template)))[:3]
    return f"{name}<{', '.join(parts)}>" if parts else name


def _template_end(text: str) -> int:
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "<") - (character == ">" and text[index - 1] != "-")
        if depth == 0:
            return index
    return len(text)


def launch_list(calls: Iterable[Call], streams: dict[str, str]) -> Counter[str]:
    """How often each launch, copy and collective occurs; with its stream, unless that is compute.

    `streams` names streams. Streams without a name are NCCL's own, which only collectives use.
    """
    counts: Counter[str] = Counter()
    for call in calls:
        stream = streams.get(call.stream, "nccl")
        # How many batches the loader copies during an update is up to its thread.
        if call.runs_on_device and stream != "loader":
            counts[call.title + ("" if stream == "compute" else f" on {stream}")] += 1
    return counts
