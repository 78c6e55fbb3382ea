"""The house: who may import whom, and a page that shows it as it is."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_contracts() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_kernels_is_a_folder_and_not_a_package() -> None:
    # It would shadow Hugging Face's `kernels` for everyone who starts Python in this folder.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_architecture_page_shows_the_tree_on_disk() -> None:
    tree = re.search(
        r"## Every file\n\n```text\n(.*?)```",
        (ROOT / "docs" / "architecture.md").read_text(),
        re.DOTALL,
    )
    assert tree is not None
    shown, folders = set(), {}
    for line in tree[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth] = name
        path = "".join(folders[level] for level in range(depth + 1))
        assert (ROOT / path).exists(), f"the page shows {path}, which is not there"
        shown.add(path)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    code = {
        path
        for path in listed.stdout.splitlines()
        if path.startswith(("fastllama/", "kernels/", "configs/", "benchmarks/", "docs/"))
        and path.endswith((".py", ".toml", ".md"))
    }
    assert code <= shown, f"the page leaves out {sorted(code - shown)}"


def test_clean_leaves_what_the_user_made() -> None:
    command = ["make", "--dry-run", "--no-print-directory", "clean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    corpus = "data/python-stdlib"
    rebuilt = [".venv", corpus, f"{corpus}.jsonl", f"{corpus}-tokenizer.json"]
    assert done.stdout.split() == ["rm", "-rf", *rebuilt]
