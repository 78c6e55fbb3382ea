"""What the processes of the benchmarks import, for the server of `benchmarks.forks`.

None of it may use a GPU or run in parallel: no fork could do so again. liger-kernel is left out,
because it looks for a GPU when it is imported.
"""

import contextlib
import importlib

for _name in (
    "torch._inductor.compile_fx",
    "torch.profiler",
    "transformers.models.llama.modeling_llama",
    "benchmarks.training.contenders",
    "benchmarks.gpu_suite",
):
    # A peer that is missing or broken is missed by those who need it, in a sentence.
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
