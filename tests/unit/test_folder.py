"""`read FOLDER`: each image a reading, written as it comes; one refusal stops nothing, and a second run goes on."""

import functools
import json
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from fake_server import FakeServer, failure, response
from PIL import Image

from cxr_triton import cli
from cxr_triton.client.wire import unpack
from cxr_triton.pixels.sandbox import identify
from cxr_triton.reading import Reading, parse

TEXT = "<think> {} </think><answer> Cardiomegaly </answer>"


@functools.cache
def identity_of(image: bytes) -> dict:
    """Each takes a process."""
    (identity,) = identify([image])
    return identity


def answer(request, context):
    """A reading of the one image; the picture of 9 px is refused, at one of 7 px the server breaks off."""
    (image,) = unpack(request.raw_input_contents[0])
    width = int.from_bytes(image[16:20], "big")
    if width == 7:
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
    if width == 9:
        yield failure("[NOT_A_CHEST] is a knee")
        return
    asked = json.loads(unpack(request.raw_input_contents[1])[0])
    facts = {"task": asked.get("task", "findings"), "prompt": "?", "timings_ms": {}}
    if asked.get("scores") and width > 12:  # no list of the first one can be taken apart
        facts["scores"] = {"Cardiomegaly": 2.5}
    if asked.get("scores"):
        facts["timings_ms"] = {"scores": 3.0}
    if asked.get("logprobs"):
        facts |= {"token_logprobs": (-0.5,), "token_ends": (4,)}
    parsed = parse(
        TEXT.format(width), grammar="think_answer", answer="labels", labels=("Cardiomegaly",), finish_reason="stop"
    )
    images = ({"identity": identity_of(image)},)
    reading = Reading.of(parsed, model={}, images=images, usage={}, notice="Research.", **facts)
    yield response("", reading.to_json(), final=True)


def png(path: Path, width: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((width, 8)).save(path, "PNG")
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, name in enumerate(("a.png", "study/b.png", "study/c")):
        png(tmp_path / "in" / name, 12 + number)
    (tmp_path / "in" / "notes.txt").write_text("hello")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"\x89PNG")
    (tmp_path / "in" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    return tmp_path / "in"


@pytest.fixture
def server():
    with FakeServer(answer) as server:
        yield server


def read(server, *args):
    return CliRunner().invoke(cli.main, ["read", "--url", server.url, *map(str, args)])


def test_a_second_run_reads_again_what_lacks_what_is_asked_for(folder, server, tmp_path):
    out = tmp_path / "out"
    for options, again in (
        ((), 3),
        (("--scores",), 3),
        (("--scores",), 0),
        ((), 0),
        (("--scores", "--logprobs"), 3),
        (("--logprobs",), 0),
    ):
        before = len(server.requests)
        assert read(server, folder, "-o", out, *options).exit_code == 0
        assert len(server.requests) - before == again, options


@pytest.mark.parametrize("name", [".", "DICOMDIR"])
def test_each_image_of_a_folder_is_a_reading(folder, server, tmp_path, name):
    out = tmp_path / "out"
    ran = read(server, folder / name, "-o", out, "--json", "-")
    assert ran.exit_code == 0, ran.output
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == ["a.png.json", "study/b.png.json", "study/c.json"]
    assert "13" in Reading.from_json((out / "study/b.png.json").read_bytes()).reasoning
    rows = {row["file"]: row for row in json.loads(ran.stdout)["images"]}
    assert rows["a.png"]["labels"] == ["Cardiomegaly"] and rows["notes.txt"]["status"] == "NO_IMAGE"
    assert set(rows) == {"a.png", "notes.txt", "study/b.png", "study/c"}
    assert "notes.txt: NO_IMAGE: text" in ran.stderr and "[4/4] study/c: ok" in ran.stderr
    assert "3 images, 3 readings, 3 of them well formed" in ran.stderr and "Not for diagnosis" in ran.stderr


@pytest.mark.slow
def test_a_second_run_reads_only_what_is_missing_changed_or_asked_otherwise(folder, server, tmp_path):
    out = folder / "readings"  # is not read itself
    assert read(server, folder, "-o", out).exit_code == 0
    (out / "a.png.json").write_text("{")
    png(folder / "study/b.png", 20)
    del server.requests[:]
    ran = read(server, folder, "-o", out)
    assert ran.exit_code == 0 and len(server.requests) == 2 and "study/c: ok, was there" in ran.stderr
    assert "20" in Reading.from_json((out / "study/b.png.json").read_bytes()).reasoning
    assert read(server, folder, "-o", out, "--task", "report").exit_code == 0 and len(server.requests) == 5


def test_a_refused_image_is_named_and_the_others_are_read(folder, server, tmp_path):
    png(folder / "b.png", 9)
    ran = read(server, folder, "-o", tmp_path / "out")
    assert ran.exit_code == 3
    assert "b.png: NOT_A_CHEST: is a knee" in ran.stderr and "4 images, 3 readings" in ran.stdout


def test_a_server_that_goes_away_ends_it_and_what_was_read_stays(folder, server, tmp_path):
    png(folder / "b.png", 7)
    ran = read(server, folder, "-o", tmp_path / "out")
    assert ran.exit_code == 75 and "[UNAVAILABLE]" in ran.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png.json"]


def test_a_folder_without_a_reading_fails(server, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("hello")
    ran = read(server, tmp_path / "in", "-o", tmp_path / "out")
    assert ran.exit_code == 1 and "holds no DICOM, PNG or JPEG" in ran.stderr and not (tmp_path / "out").exists()
    png(tmp_path / "in" / "b.png", 9)
    assert read(server, tmp_path / "in", "-o", tmp_path / "out").exit_code == 1


@pytest.mark.parametrize("args", [[], ["-o", "out", "a.png"], ["-o", "out", "--html", "p.html"]])
def test_wrong_usage_of_a_folder_is_told(folder, server, monkeypatch, args):
    monkeypatch.chdir(folder)
    ran = read(server, ".", *args)
    assert ran.exit_code == 2 and "-o FOLDER" in ran.stderr and not server.requests
    ran = read(server, "a.png", "-o", "out")
    assert ran.exit_code == 2 and "of a FOLDER" in ran.stderr


def test_a_site_asks_for_hashed_identifiers_once(folder, server, tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_IDENTIFIERS", "hashed")
    assert read(server, folder, "-o", tmp_path / "out").exit_code == 0
    assert server.asked["identifiers"] == "hashed"
    assert read(server, folder / "a.png", "--identifiers", "plain").exit_code == 0
    assert server.asked["identifiers"] == "plain"
