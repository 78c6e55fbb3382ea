"""What the processes of the benchmarks import, for the server of `benchmarks.forks`.

None of it may ask the driver for a GPU, or run anything in parallel: a fork inherits neither.
"""

import contextlib
import importlib

for _name in (
    "torch._inductor.compile_fx",
    "torch.profiler",
    "transformers.models.llama.modeling_llama",
    "liger_kernel.transformers",
    "benchmarks.training.contenders",
    "benchmarks.gpu_suite",
):
    # A peer that is missing or broken is missed by those who need it, in a sentence.
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
