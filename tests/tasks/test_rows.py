import gzip
import json

import pytest

from loralab.errors import UserError
from loralab.tasks.layouts import pairs
from loralab.tasks.rows import Row, read_rows, split_files

ROWS = [{"question": "one", "answer": "two"}, {"question": 'q "3", x', "answer": "4"}]


def test_every_format_reads_the_same_rows(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    lines = "\n".join(map(json.dumps, ROWS))
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS, "version": 1}))
    (tmp_path / "a.csv").write_text('question,answer\none,two\n"q ""3"", x",4\n')
    (tmp_path / "a.tsv").write_text('question\tanswer\none\ttwo\nq "3", x\t4\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert [row.fields for row in read_rows(file)] == ROWS, file.name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 1', r"a\.jsonl, row 3: not JSON .*column 8"),
        ("a.json", "[\n 1, 2", r"a\.json: not JSON .*line 2"),
        ("a.json", "[3]", "row 1: expected an object"),
        ("a.json", '{"x": 1}', "must hold a list"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.txt", "x", "is not one of"),
        ("a.parquet", "PAR1", "not a Parquet file"),
        ("a.jsonl.gz", "x", "cannot be read"),
        ("b.jsonl", None, "No such file"),
    ],
)
def test_unreadable_data_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a\n\xff\n")
    with pytest.raises(UserError, match=r"not UTF-8 text .byte 2"):
        read_rows(tmp_path / "a.csv")


def test_split_files(tmp_path):
    for name in ("x_train.jsonl", "x-dev.csv", "x.test.json", "contrast.json", "notes.md"):
        (tmp_path / name).touch()
    found = {split: file.name for split, file in split_files(tmp_path).items()}
    assert found == {"train": "x_train.jsonl", "validation": "x-dev.csv", "test": "x.test.json"}
    (tmp_path / "y_test.json").touch()
    with pytest.raises(UserError, match=r"two files for test.*test="):
        split_files(tmp_path)
    assert split_files(tmp_path, prefix="x")["test"].name == "x.test.json"
    with pytest.raises(UserError, match="no training file"):
        split_files(tmp_path, (".npz",))


def test_layouts():
    def pair(**fields):
        (found,) = pairs([Row(fields, "f, row 1")], None, None, object())
        return found.prompt, found.answer

    assert pair(prompt="a", completion="b") == ("a", "b")
    assert pair(text="a") == ("", "a")
    assert pair(question="a", answer=7) == ("Question: a\nAnswer:", " 7")
    bare = "Instruction: a\nResponse:"
    assert pair(instruction="a", input="", output="b") == (bare, " b")
    assert pair(instruction="a", input="i", output="b")[0] == "Instruction: a\ni\nResponse:"
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "never seen")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert pair(messages=messages) == ("System: s\nUser: u\nAssistant:", " a")


def test_named_fields_and_templates():
    rows = [Row({"q": "1{2", "a": "b"}, "f, row 1")]
    assert pairs(rows, "q", "a", None)[0].prompt == "1{2"
    assert pairs(rows, "Say {q}!", "a", None)[0].prompt == "Say 1{2!"
    assert pairs(rows, None, "a", None)[0].prompt == ""
    with pytest.raises(UserError, match=r"template .* is malformed"):
        pairs(rows, "{q", "a", None)
    with pytest.raises(UserError, match="needs the option answer"):
        pairs(rows, "q", None, None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"quest": "a", "answer": "b"}], "row 1: found the fields quest, answer, expected"),
        ([ROWS[0], {"question": "a"}], r"row 2: the row lacks the field 'answer'"),
        ([ROWS[0], ROWS[0] | {"answer": None}], r"row 2: the row lacks the field 'answer'"),
        ([{"text": ["a"]}], "row 1: the row has no text in the field 'text'"),
        ([{"messages": "hi"}], "row 1: the field 'messages' must be a list"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "row 1: no assistant message"),
    ],
)
def test_a_row_without_its_field_is_named(rows, message):
    with pytest.raises(UserError, match=message):
        pairs([Row(r, f"f.jsonl, row {n}") for n, r in enumerate(rows, 1)], None, None, None)
