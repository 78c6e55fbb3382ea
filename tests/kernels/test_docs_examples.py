import dataclasses
import re
from pathlib import Path

import pytest

from fastllama_kernels import Operators
from fastllama_kernels.attention_backends import set_flash_implementation

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
TEXT = PAGE.read_text()
EXAMPLES = list(re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))


def heading(example: re.Match[str]) -> str:
    # One # may be a comment in an example.
    headings = re.findall(r"^##+ (.+)$", TEXT[: example.start()], re.MULTILINE)
    return headings[-1] if headings else "introduction"


@pytest.mark.parametrize("example", EXAMPLES, ids=heading)
def test_example_runs(
    example: re.Match[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The example of choose_attention writes to the user's cache.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Blank lines make a traceback point at the line of the page.
    code = "\n" * TEXT.count("\n", 0, example.start(1)) + example[1]
    try:
        exec(compile(code, str(PAGE), "exec"), {})
    finally:
        set_flash_implementation(None)


def test_every_operator_has_an_example() -> None:
    code = "".join(example[1] for example in EXAMPLES)
    operators = {field.name for field in dataclasses.fields(Operators)} - {"name"}
    assert {name for name in operators if not re.search(rf"\b{name}\(", code)} == set()
