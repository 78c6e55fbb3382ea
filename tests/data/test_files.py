import os
import socket
from pathlib import Path

import pytest

from fastllama.data import files as files_module
from fastllama.data.files import SUFFIXES, InputFiles, find_files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a/deep/c.jsonl", "a/d.txt.gz", ".hidden/e.txt", "a/.f.txt", "a/g.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def names(root: Path, *inputs: str) -> list[str]:
    return [str(path.relative_to(root)) for path in find_files(inputs).paths]


def left_out(files: InputFiles) -> dict[str, list[str]]:
    """Base names of the entries left out, by reason."""
    return {
        reason: [os.path.basename(name) for name in entries.names]
        for reason, entries in files.left_out.items()
    }


def test_folders_give_visible_supported_files(tree: Path) -> None:
    assert names(tree, str(tree)) == ["a/d.txt.gz", "a/deep/c.jsonl", "b.txt"]


def test_hidden_files_and_other_suffixes_are_counted(tree: Path) -> None:
    found = find_files([str(tree)])
    assert left_out(found) == {"hidden": [".hidden", ".f.txt"], "other suffixes": ["g.md"]}
    assert found.describe_left_out() == (
        f"hidden 2 ({tree}/.hidden, {tree}/a/.f.txt), other suffixes 1 ({tree}/a/g.md)"
    )


def test_only_the_first_names_are_kept(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number:03}.csv").touch()
    (tmp_path / "a.txt").touch()
    description = find_files([str(tmp_path)]).describe_left_out()
    assert description.startswith("other suffixes 1,000 (")
    assert description.endswith("002.csv, …)")
    assert len(description) < 1000


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffixes_of_any_case(tmp_path: Path, suffix: str) -> None:
    for name in (f"a{suffix}", f"B{suffix.upper()}"):
        (tmp_path / name).touch()
    assert names(tmp_path, str(tmp_path)) == [f"B{suffix.upper()}", f"a{suffix}"]
    assert names(tmp_path, f"{tmp_path}/B{suffix.upper()}") == [f"B{suffix.upper()}"]


def test_patterns_match_subfolders(tree: Path) -> None:
    assert names(tree, f"{tree}/**/*.jsonl") == ["a/deep/c.jsonl"]
    assert names(tree, f"{tree}/a/*") == ["a/d.txt.gz", "a/deep/c.jsonl"]
    assert names(tree, f"{tree}/**") == names(tree, str(tree))
    assert names(tree, f"{tree}/*/") == ["a/d.txt.gz", "a/deep/c.jsonl"]
    assert names(tree, f"{tree}/.hid*/*") == [".hidden/e.txt"]


def test_patterns_match_from_the_working_folder(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    assert names(tree, "**/*.t[a-x]t*") == ["a/d.txt.gz", "b.txt"]
    assert names(tree, "a/../?.txt") == ["a/../b.txt"]


@pytest.mark.parametrize("name", ["a[1] {x} $y.txt", "new\nline.txt", "-dash.txt", "lat\udce9.txt"])
def test_names_are_data(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    folder = tmp_path / "[odd]*"
    folder.mkdir()
    (folder / name).touch()
    expected = [f"[odd]*/{name}"]
    assert names(tmp_path, str(folder)) == expected
    assert names(tmp_path, f"{folder}/*.txt") == expected
    assert names(tmp_path, str(tmp_path / name)) == [name]


def test_home_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    assert names(tree, "~/b.txt", "~/a/*.gz") == ["a/d.txt.gz", "b.txt"]


def test_each_file_is_found_once(tree: Path) -> None:
    (tree / "z.txt").symlink_to(tree / "b.txt")
    inputs = [str(tree / "b.txt"), f"{tree}/*.txt", str(tree / "a/../b.txt")]
    assert [path.resolve() for path in find_files(inputs).paths] == [tree / "b.txt"]


def test_input_order_is_irrelevant(tree: Path) -> None:
    inputs = [str(tree / "b.txt"), str(tree / "a")]
    assert find_files(inputs).paths == find_files(inputs[::-1]).paths


@pytest.mark.parametrize(
    "name", ["missing.txt", "*.parquet", "a/.hidden", "x" * 5000, "nul\0.txt", "**/none"]
)
def test_rejects_input_without_files(tree: Path, name: str) -> None:
    with pytest.raises(ValueError, match="matches no file") as caught:
        find_files([str(tree), f"{tree}/{name}"])
    assert len(str(caught.value)) < 1000


def test_error_counts_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"left out: other suffixes 1 \(.*a\.csv\)"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize("name", ["g.md", "x.jsonl.zip", "x.csv"])
def test_rejects_unsupported_suffix(tree: Path, name: str) -> None:
    (tree / name).touch()
    with pytest.raises(ValueError, match=rf"{name}: its suffix is not \.txt.*unpack"):
        find_files([str(tree / name)])


@pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/*/*.txt"])
@pytest.mark.timeout(20)
def test_folders_that_link_to_themselves(tree: Path, pattern: str) -> None:
    for name in ("one", "two", "a/three", "a/deep/four"):
        (tree / name).symlink_to(tree)
    (tree / "loop.txt").symlink_to(tree / "loop.txt")
    (tree / "gone.txt").symlink_to(tree / "nothing")
    found = find_files([f"{tree}{pattern}"])
    assert [path.name for path in found.paths if path.suffix == ".txt"] == ["b.txt"]
    if pattern != "/*/*.txt":
        assert found.left_out["folders searched already"].count == 4


@pytest.mark.timeout(20)
def test_many_folders_that_link_to_each_other(tmp_path: Path) -> None:
    folders = [tmp_path / f"{number:02}" for number in range(20)]
    for folder in folders:
        folder.mkdir()
        (folder / "x.txt").touch()
    for folder in folders:
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    assert len(find_files([str(tmp_path)]).paths) == 20
    assert len(find_files([f"{tmp_path}/**/*.txt"]).paths) == 20


def test_linked_folders_are_searched(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.txt").touch()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/link").symlink_to("../elsewhere")
    assert names(tmp_path, f"{tmp_path}/corpus") == ["corpus/link/x.txt"]


def test_special_files(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    os.mkfifo("pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jsonl")
        assert names(tree, ".") == ["a/d.txt.gz", "a/deep/c.jsonl", "b.txt"]
        found = find_files(["."])
        assert left_out(found)["FIFOs, sockets and devices"] == ["pipe.txt", "socket.jsonl"]
        for name, kind in (("pipe.txt", "FIFO"), ("socket.jsonl", "socket"), ("/dev/null", "devi")):
            with pytest.raises(ValueError, match=f"{name}: it is a {kind}"):
                find_files([name])


def test_unreadable_entries(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = {str(tree / "a/deep"), str(tree / "b.txt")}
    # Root may read everything, so permissions alone do not show it.
    monkeypatch.setattr(files_module.os, "access", lambda path, mode: str(path) not in locked)
    found = find_files([str(tree)])
    assert [path.name for path in found.paths] == ["d.txt.gz"]
    assert left_out(found)["unreadable"] == ["b.txt", "deep"]
    for path in locked:
        with pytest.raises(ValueError, match=f"cannot read .*{path}: permission denied; change"):
            find_files([path])


def test_deep_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    depth = 1010
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    Path("x.txt").touch()
    os.chdir(tmp_path)
    try:
        assert len(find_files(["."]).paths) == 1
    finally:  # Too deep for the clean-up of pytest.
        for _ in range(depth):
            os.chdir("d")
        os.unlink("x.txt")
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")


def test_saved_dataset_of_hugging_face(tmp_path: Path) -> None:
    folder = tmp_path / "saved/train"
    folder.mkdir(parents=True)
    for name in ("data.arrow", "dataset_info.json", "state.json", "../dataset_dict.json"):
        (folder / name).touch()
    (tmp_path / "state.json").touch()
    with pytest.raises(ValueError, match=r"left out: descriptions of a dataset 3 .*json.*, Arrow"):
        find_files([str(folder.parent)])
    found = find_files([str(tmp_path)])
    assert [path.name for path in found.paths] == ["state.json"]
    assert left_out(found)["Arrow files (`dataset.to_parquet` exports them)"] == ["data.arrow"]
    # Exported beside the original, it is read.
    (folder / "data.parquet").touch()
    assert names(tmp_path, str(folder)) == ["saved/train/data.parquet"]
    with pytest.raises(ValueError, match=r"`dataset.to_parquet` does for \.arrow"):
        find_files([str(folder / "data.arrow")])


def test_data_folders_hold_no_documents(tree: Path) -> None:
    for name in ("job.json", "manifest.json", "tokenizer.json"):
        path = tree / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    assert names(tree, str(tree)) == ["a/d.txt.gz", "a/deep/c.jsonl", "b.txt"]
    with pytest.raises(ValueError, match="data folders of fastllama 1"):
        find_files([str(tree / "data")])
