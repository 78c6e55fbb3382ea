import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.data import json_records
from fastllama.data.documents import Document, Empty, Malformed, read_documents
from fastllama.data.readers import read_file
from fastllama.data.records import NoText

TEXTS = ["a", "b\nc", "é日🦙", " ", '"]}, {[', "d" * 3000]
RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


def read(path: Path) -> tuple[list[str], list[str]]:
    """Texts of the documents, and reasons of the malformed records."""
    records = list(read_documents([path, path.with_name("z.txt")]))
    texts = [record.text for record in records if isinstance(record, Document)]
    reasons = [record.reason for record in records if isinstance(record, Malformed)]
    assert texts.pop() == "next"
    return texts, reasons


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "z.txt").write_text("next")
    return tmp_path / "x.json"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=1, ensure_ascii=False),
        "\n".join(map(json.dumps, RECORDS)),
        "\r\n\r\n".join(map(json.dumps, RECORDS)) + "\r\n",
        "\n".join(json.dumps(record, indent=4) for record in RECORDS),
        " \n[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    ],
    ids=["array", "indented array", "lines", "lines of Windows", "indented", "array of lines"],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("buffer_bytes", [7, 2**20])
def test_array_objects_and_lines(
    path: Path, content: str, mark: str, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "BUFFER_BYTES", buffer_bytes)
    path.write_bytes((mark + content).encode())
    assert read(path) == (TEXTS, [])
    packed = path.with_suffix(".json.gz")
    packed.write_bytes(gzip.compress((mark + content).encode()))
    assert read(packed) == (TEXTS, [])


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object(path: Path, indent: int | None) -> None:
    path.write_text(json.dumps({"text": "a", "more": [1]}, indent=indent))
    assert read(path) == (["a"], [])


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_without_the_field_is_no_document(path: Path, indent: int | None) -> None:
    metadata = {"splits": {"train": 3}, "version": "1", "name": "", "license": "MIT"}
    path.write_text(json.dumps(metadata, indent=indent))
    first, _ = read_documents([path, path.with_name("z.txt")])
    assert isinstance(first, Empty)
    with pytest.raises(ValueError, match="choose one of license, version with --field"):
        list(read_documents([path]))


@pytest.mark.parametrize("record", [{}, {"data": [{"text": "a"}]}, {"messages": ["a"], "id": 1}])
def test_no_field_is_offered_that_holds_no_text(path: Path, record: object) -> None:
    path.write_text(json.dumps(record))
    first, _ = read_documents([path, path.with_name("z.txt")])
    assert isinstance(first, Empty)
    with pytest.raises(ValueError, match="has the field 'text' or another field with text: write"):
        list(read_documents([path]))


@pytest.mark.parametrize("broken", ["{broken", '{"text": "cut', '{"text": }'])
def test_malformed_first_line_costs_one_record(path: Path, broken: str) -> None:
    path.write_text(broken + "\n" + json.dumps({"text": "a"}) + "\n")
    texts, reasons = read(path)
    assert texts == ["a"]
    assert len(reasons) == 1


@pytest.mark.parametrize("between", [", ", "\n"])
def test_integers_of_any_length(path: Path, between: str) -> None:
    records = between.join(
        ['{"text": "a", "n": %s}' % ("9" * 5000), '{"text": "b", "n": -1e999}', '{"text": "c"}']
    )
    path.write_text(f"[{records}]" if between == ", " else records)
    assert read(path) == (["a", "b", "c"], [])


@pytest.mark.parametrize(
    ("content", "texts", "reason"),
    [
        ('[{"text": "a"}, {"text": "b"', ["a"], "not JSON"),
        ('[{"text": "a"}, {"text": "b"}', ["a", "b"], "not JSON"),
        ('[{"text": "a"}, {broken}, {"text": "b"}]', ["a", "b"], "not JSON (Expecting property"),
        ('[{"text": "a"}, {"b": "}" "]"}, {"text": "b"}]', ["a", "b"], "not JSON (Expecting ','"),
        ('[{"text": "a"}, broken, {"text": "b"}]', ["a"], "not JSON"),
        ('[{"text": "a"}, 12, {"text": "b"}]', ["a", "b"], "not a JSON object"),
        ('[{"text": "a"}, {"body": 1}]', ["a"], "no field 'text' among body"),
        ('[{"text": "a"}]\n[{"text": "b"}]', ["a"], "not a JSON object"),
        ('[{"text": "a"}, ' + "[" * 100_000, ["a"], "nested too deeply"),
        ('[{"text": "a"}, {"text": "\\ud800"}]', ["a"], "lone surrogate"),
        ("[[[[[[[[[", [], "not JSON"),
        ("[", [], "not JSON"),
    ],
)
def test_damaged_arrays(path: Path, content: str, texts: list[str], reason: str) -> None:
    path.write_text(content)
    found, reasons = read(path)
    assert found == texts
    [only] = reasons
    assert reason in only


def test_array_with_invalid_utf8(path: Path) -> None:
    path.write_bytes(b'[{"text": "a"}, {"text": "\xff"}, {"text": "b"}]')
    texts, [reason] = read(path)
    assert texts == ["a", "b"]
    assert "or is not UTF-8; convert another encoding, as with `iconv" in reason


def test_number_is_not_cut_at_the_end_of_the_buffer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "BUFFER_BYTES", 1)
    path.write_text('[123456, {"text": "a"}, 9876]')
    texts, reasons = read(path)
    assert texts == ["a"]
    assert reasons == ['not a JSON object; write a text as {"text": "…"}'] * 2


def test_empty_array(path: Path) -> None:
    path.write_text(" [ ] \n")
    assert read(path) == ([], [])


def in_small_parts(patch: pytest.MonkeyPatch) -> None:
    """Read files byte by byte, and parse no value of more than 20 characters."""
    patch.setattr(json_records, "BUFFER_BYTES", 1)
    patch.setattr(json_records, "LONG_RECORD_BYTES", 20)


LONG = "longer than 8 MB: write JSON Lines, with one record a line"


@pytest.mark.parametrize(
    ("long", "reasons"),
    [
        ('{"text": "%s"}' % ("b" * 500), [LONG]),
        ('"%s\\\\\\"]}{[ 日本語"' % ("\\\\" * 100), [LONG]),
        ('{"a": [{"b": "}]"}, {}, "\\\\"], "text": "%s"}' % ("\\u00e9" * 50), [LONG]),
        ("[" * 100_000 + '"]"' + "]" * 100_000, ["nested too deeply"]),
        # None of its ends is known.
        ('{"text": "%s}' % ("b" * 500), ["a record is longer than 8 MB: write JSON Lines"]),
        ("1" * 500, ["a record is longer than 8 MB: write JSON Lines"]),
    ],
)
def test_long_record_of_an_array_is_passed_over(
    path: Path, monkeypatch: pytest.MonkeyPatch, long: str, reasons: list[str]
) -> None:
    if reasons != ["nested too deeply"]:
        in_small_parts(monkeypatch)
    path.write_text('[{"text": "a"}, ' + long + ' , {"text": "c"}]')
    texts, found = read(path)
    assert texts == (["a"] if "a record" in reasons[0] else ["a", "c"])
    assert [reason in each for reason, each in zip(reasons, found, strict=True)] == [True]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "%s"}', ""),
        ('{"n": NaN, "list": [[[1]], {"text": 1}], "text": "%s"}', ""),
        ('\ufeff{"text": "%s"}', ""),
        ('{"body": "%s"}', "missing or null"),
        ('{"text": null, "body": "%s"}', "missing or null"),
        ('{"text": ["%s"]}', "no JSON object with a string 'text'"),
        ('{"text": "%s"', "no JSON object with a string 'text'"),
        ('["%s"]', "no JSON object with a string 'text'"),
        ('{"text": "%s"}{"text": "a"}', "2 JSON objects in a line"),
        ('{"text": "%s\\ud800"}', "no JSON object with a string 'text'"),
    ],
)
def test_long_lines(path: Path, line: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "LONG_RECORD_BYTES", 100)
    lines = path.with_suffix(".jsonl")
    text = "naïve 日本語 " * 50
    lines.write_text(f"{line % text}\n" + '{"text": "b"}\n')
    texts, reasons = read(lines)
    assert texts == ([] if reason else [text]) + ["b"]
    assert [reason in found for found in reasons] == ([True] if reason else [])


def test_long_line_with_invalid_utf8(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "LONG_RECORD_BYTES", 100)
    lines = path.with_suffix(".jsonl")
    lines.write_bytes(b'{"n": "' + b"a" * 200 + b'\xff", "text": "b"}\n')
    assert read(lines) == ([], ["not UTF-8 at byte 207"])


def test_record_after_a_long_one_keeps_its_number(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_parts(monkeypatch)
    path.write_text('[{"text": "a"}, {"text": "%s"}, {"text": "c"}]' % ("b" * 500))
    records = [record for record in read_file(path, "text", 1, 2**30)]
    assert [record.number for record in records] == [2, 3]
    assert records[1].content == "c"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(st.sampled_from(["text", "a", "b"]), JSON), min_size=1))
def test_long_lines_are_read_as_short_ones(
    tmp_path_factory: pytest.TempPathFactory, records: list[object]
) -> None:
    path = tmp_path_factory.mktemp("long") / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    path.with_name("z.txt").write_text("next")
    short = read(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "LONG_RECORD_BYTES", 0)
        long = read(path)
    assert long[0] == short[0]
    assert len(long[1]) == len(short[1])


@settings(deadline=None, max_examples=200)
@given(st.lists(JSON, min_size=1), st.booleans())
def test_long_values_end_where_parsed_ones_do(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("values") / "x.json"
    after = {"text": "after"}
    parts = [json.dumps(value, ensure_ascii=ascii_only) for value in [*values, after]]
    path.write_text("[" + ",\n".join(parts) + "]")
    with pytest.MonkeyPatch.context() as patch:
        in_small_parts(patch)
        records = list(read_file(path, "text", 0, 2**30))
    assert [record.number for record in records] == list(range(1, len(values) + 2))
    for text, record in zip(parts, records, strict=True):
        # Parts of up to 40 characters may be read before the limit of 20 is looked at.
        is_long = len(text) > 60 and text[0] in '[{"'
        assert (isinstance(record.content, NoText) and record.content.reason == LONG) or not is_long
    assert records[-1].content == "after"
