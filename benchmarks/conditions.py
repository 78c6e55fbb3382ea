"""Conditions of a measurement: device, software versions, clocks, power."""

import os
import platform
import statistics
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import triton

from benchmarks.results import Conditions
from fastllama.run_folder import git_revision


def has_gpu() -> bool:
    """True for a measurement, False for a rehearsal on a CPU."""
    return torch.cuda.is_available()


def default_device() -> torch.device:
    """The first GPU, or the CPU in a rehearsal."""
    return torch.device("cuda", 0) if has_gpu() else torch.device("cpu")


def current_conditions() -> Conditions:
    """Conditions of this process at this moment."""
    if has_gpu():
        properties = torch.cuda.get_device_properties(0)
        device = properties.name
        n_multiprocessors = properties.multi_processor_count
        memory_bytes = properties.total_memory
    else:
        device, n_multiprocessors = _processor(), torch.get_num_threads()
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    driver, power_limit, clock = _query("driver_version,power.limit,clocks.max.sm") or ("", "", "")
    return Conditions(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        device=device,
        is_rehearsal=not has_gpu(),
        n_multiprocessors=n_multiprocessors,
        memory_bytes=memory_bytes,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        cuda=torch.version.cuda or "",
        cudnn=str(torch.backends.cudnn.version() or ""),
        driver=driver,
        power_limit_watts=_number(power_limit),
        max_sm_clock_mhz=_number(clock),
    )


def results_name(conditions: Conditions) -> str:
    """Name of the device's folder under results, such as `h200` for `NVIDIA H200`."""
    if conditions.is_rehearsal:
        return "cpu-rehearsal"
    words = conditions.device.removeprefix("NVIDIA ").lower().split()
    return "-".join(words)


class GpuMonitor:
    """Samples clock and power of the first GPU once a second. Without nvidia-smi both are None."""

    def __init__(self) -> None:
        self._clocks: list[float] = []
        self._watts: list[float] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if not has_gpu():
            return self
        command = ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm,power.draw"]
        command += ["--format=csv,noheader,nounits", "-l", "1"]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            return self
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            for value, samples in zip(line.split(","), (self._clocks, self._watts), strict=False):
                number = _number(value)
                if number is not None:
                    samples.append(number)

    @property
    def sm_clock_mhz(self) -> float | None:
        """Median of the samples so far."""
        return statistics.median(self._clocks) if self._clocks else None

    @property
    def power_watts(self) -> float | None:
        """Median of the samples so far."""
        return statistics.median(self._watts) if self._watts else None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def _query(fields: str) -> list[str] | None:
    """Fields of the first GPU from nvidia-smi; None if nvidia-smi is missing or fails."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return [value.strip() for value in done.stdout.splitlines()[0].split(",")]


def _number(text: str) -> float | None:
    """None for `[N/A]`, nvidia-smi's value for an unavailable field."""
    try:
        return float(text)
    except ValueError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _commit() -> str:
    """Commit of the measured tree. FASTLLAMA_COMMIT names it where the tree has no .git."""
    return os.environ.get("FASTLLAMA_COMMIT") or git_revision() or ""
