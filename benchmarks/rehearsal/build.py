"""Builds the null CUDA libraries, and the environment of a process that runs on them."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).parent / "null_cuda"
PRELOADED = {"runtime": r"^(cuda|__cuda)", "cublas": r"^cublas", "nccl": r"^nccl"}
"""Libraries that come before PyTorch's own, and the functions of theirs that PyTorch calls."""
FOUND_BY_NAME = {"driver": "libcuda.so.1", "nvml": "libnvidia-ml.so.1"}
"""Libraries of NVIDIA's driver, which PyTorch and Triton open by name."""


def build(folder: Path) -> None:
    """Compile all libraries into `folder`, for the PyTorch that is installed here.

    Raises:
        RuntimeError: gcc fails, or PyTorch is no CUDA build.
    """
    packages = Path(sysconfig.get_path("purelib"))
    library = packages / "torch" / "lib" / "libtorch_cuda.so"
    if not library.exists():
        raise RuntimeError(f"{library} is missing: PyTorch is no CUDA build")
    folder.mkdir(parents=True, exist_ok=True)
    # Triton brings the headers along.
    headers = packages / "triton" / "backends" / "nvidia" / "include"
    wanted = symbols(library, "--undefined-only")
    for name in PRELOADED:
        # Functions of the runtime that are missing here come from the real one: it needs no device.
        stubs = set() if name == "runtime" else matching(wanted, PRELOADED[name])
        compile_library(name, folder / f"null_{name}.so", headers, stubs)
    for name, file in FOUND_BY_NAME.items():
        stubs = driver_functions(headers / "cuda.h") if name == "driver" else set()
        compile_library(name, folder / file, headers, stubs)


def matching(names: set[str], pattern: str) -> set[str]:
    """The names that begin with the pattern."""
    return {name for name in names if re.match(pattern, name)}


def symbols(file: Path, which: str) -> set[str]:
    """Names of dynamic symbols, `--undefined-only` or `--defined-only`, without versions."""
    listed = run(["nm", "--dynamic", which, "--format=just-symbols", str(file)])
    return {name.partition("@")[0] for name in listed.split()}


def driver_functions(header: Path) -> set[str]:
    """Every function that cuda.h declares, and the versions that it renames them to."""
    text = header.read_text()
    names = set(re.findall(r"CUresult\s+CUDAAPI\s+(cu\w+)\s*\(", text))
    return names | set(re.findall(r"#\s*define\s+cu\w+\s+(?:__CUDA_API_PT\w+\()?(cu\w+_v\d)", text))


def compile_library(name: str, output: Path, headers: Path, stubs: set[str]) -> None:
    """Compile one source; functions of `stubs` that it lacks do nothing and return 0."""
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-I{headers}", f"-I{SOURCES}"]
    command += ["-o", str(output), str(SOURCES / f"{name}.c")]
    libraries = ["-ldl", "-lpthread"]
    if (versions := SOURCES / f"{name}.map").exists():
        command.append(f"-Wl,--version-script={versions}")
    run([*command, *libraries])
    if missing := stubs - symbols(output, "--defined-only"):
        generated = output.with_suffix(".stubs.c")
        generated.write_text("".join(f"int {stub}() {{ return 0; }}\n" for stub in sorted(missing)))
        run([*command, str(generated), *libraries])


def run(command: list[str]) -> str:
    """Standard output of a command.

    Raises:
        RuntimeError: it is missing or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is missing; install gcc and binutils") from None
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a process on the null device."""
    variables = {
        "LD_LIBRARY_PATH": str(folder),
        "LD_PRELOAD": ":".join(str(folder / f"null_{name}.so") for name in PRELOADED),
        # Importing `benchmarks` without a GPU has turned Triton's interpreter on in this process.
        "TRITON_INTERPRET": "0",
    }
    return os.environ | variables | more
