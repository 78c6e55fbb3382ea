"""docs/architecture.md: its picture and its paths are those of the code."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DRAW_ROOMS = runpy.run_path(str(ROOT / "docs" / "draw_rooms.py"))


def test_picture_is_drawn_from_the_imports() -> None:
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert picture == DRAW_ROOMS["draw"](), "run: python docs/draw_rooms.py"


def test_picture_and_contract_have_every_room() -> None:
    package = ROOT / "fastllama"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    files = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    rooms = folders | files | {"fastllama_kernels"}
    assert set(DRAW_ROOMS["ROOMS"]) == rooms
    assert {room for layer in DRAW_ROOMS["layers"]() for room in layer} == rooms


def test_page_names_every_room_of_the_way_of_a_token_in_order() -> None:
    way = PAGE.partition("## The way of a token")[2].partition("## ")[0]
    named = [name.removesuffix(".py") for name in re.findall(r"^\d\. \*\*([\w.]+)\*\*", way, re.M)]
    assert named == list(DRAW_ROOMS["TOKEN_PATH"])


def test_page_names_files_and_functions_that_exist() -> None:
    where_to_add = PAGE.partition("## Where to add")[2].partition("## Every file")[0]
    paths = re.findall(r"`([\w/]+/[\w/]+\.(?:py|md))`", where_to_add)
    assert len(paths) > 15
    for path in paths:
        folder = (ROOT / path).parent
        assert folder.is_dir() if "NAME" in path else (ROOT / path).is_file(), path
    code = "\n".join(path.read_text() for path in (ROOT / "fastllama").rglob("*.py"))
    for name in ("build_optimizer", "build_state", "find_files", "report_write_errors", "COMMANDS"):
        assert name in where_to_add
        assert re.search(rf"^(def )?{name}\b", code, re.M), name
