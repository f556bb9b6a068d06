"""A result on a disk: what is written is read again, and what is no result is refused by line."""

import dataclasses
import json

import pytest

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate import rows
from cxr_triton.evaluate.rows import Answer, Box, Header, Row, Truth

HEADER = Header(
    kind="labels",
    data={"name": "own", "studies": 2},
    labels=("Edema", "No Finding"),
    mapping={"oedema": "Edema", "Hernia": None},
    times={"read_s": 1.5},
)
READ = Row(
    number=0,
    study="1/a",
    patient="00",
    groups={"sex": "F"},
    images=("a.png", "b.png"),
    kind="labels",
    truth=Truth(
        labels={"Edema": 1, "No Finding": None},
        boxes=(Box(label="Edema", corners=(0.0, 1.5, 2.0, 3.0), reader="R1"),),
        readers={"R1": {"Edema": 1}},
    ),
    answer=Answer(labels={"Edema": 0, "No Finding": 1}, text="É\u2028", scores={"Edema": 0.25}),
    status="flagged",
    code="truncated",
    times={"asked_ms": 12.0},
)
FAILED = dataclasses.replace(READ, number=1, answer=None, status="error", code="QUEUE_FULL", said="later", times={})


def test_a_result_comes_back_as_it_was_written(tmp_path):
    rows.write(tmp_path / "result.jsonl", HEADER, iter([READ, rows.line_of(FAILED)]))
    result = rows.read(tmp_path / "result.jsonl")
    assert (result.header, list(result), list(result), len(result)) == (HEADER, [READ, FAILED], [READ, FAILED], 2)
    assert READ.truncated and not READ.malformed


def test_two_runs_are_the_same_but_for_their_times(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    rows.write(a, HEADER, [READ, FAILED])
    later = dataclasses.replace(HEADER, times={"read_s": 3.0})
    rows.write(b, later, [dataclasses.replace(READ, times={"asked_ms": 1.0}), FAILED])
    rows.write(c, later, [dataclasses.replace(READ, study="2"), FAILED])
    digests = [rows.timeless_digest(path) for path in (a, b, c)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("at", "text", "said"),
    [
        (0, "", "result.jsonl:1: is no header"),
        (0, "[]", "result.jsonl:1: is no header"),
        (0, json.dumps({**dataclasses.asdict(HEADER), "version": 9}), "version 9, this release reads 1"),
        (1, "{", "result.jsonl:2: is no row"),
        (2, rows.line_of(FAILED).replace('"patient": "00"', '"patient": 0'), "result.jsonl:3: is no row"),
        (2, None, "has 1 rows, its header says 2"),
    ],
)
def test_what_is_no_result_is_refused_by_line(tmp_path, at, text, said):
    lines = [rows.line_of(line) for line in (HEADER, READ, FAILED)]
    lines[at : at + 1] = [] if text is None else [text]
    (tmp_path / "result.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidRequest, match=said):
        list(rows.read(tmp_path / "result.jsonl"))


def test_a_write_that_fails_leaves_the_old_result(tmp_path):
    rows.write(tmp_path / "result.jsonl", HEADER, [READ, FAILED])
    before = (tmp_path / "result.jsonl").read_bytes()

    def breaks():
        yield READ
        raise ValueError("gone")

    with pytest.raises(ValueError, match="gone"):
        rows.write(tmp_path / "result.jsonl", HEADER, breaks())
    assert (tmp_path / "result.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["result.jsonl"]
