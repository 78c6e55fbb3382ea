"""The layout of the repository: imports, folders, the page about them, and `make clean`."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_contracts() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_kernels_folder_is_no_package() -> None:
    # A package would shadow Hugging Face's `kernels` for a Python that starts in this folder.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_architecture_page_lists_every_file() -> None:
    tree = re.search(
        r"## Every file\n\n```text\n(.*?)```",
        (ROOT / "docs" / "architecture.md").read_text(),
        re.DOTALL,
    )
    assert tree is not None
    listed, folders = set(), {}
    for line in tree[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth] = name
        path = "".join(folders[level] for level in range(depth + 1))
        assert (ROOT / path).exists(), f"the page lists {path}, which does not exist"
        listed.add(path)
    git = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    code = {
        path
        for path in git.stdout.splitlines()
        if path.startswith(("fastllama/", "kernels/", "configs/", "benchmarks/", "docs/"))
        and path.endswith((".py", ".toml", ".md"))
    }
    assert code <= listed, f"the page omits {sorted(code - listed)}"


def test_clean_removes_only_what_make_can_rebuild() -> None:
    command = ["make", "--dry-run", "--no-print-directory", "clean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    corpus = "data/python-stdlib"
    rebuilt = [".venv", ".venv-cuda", corpus, f"{corpus}.jsonl", f"{corpus}-tokenizer.json"]
    assert done.stdout.split() == ["rm", "-rf", *rebuilt]
