"""Results on a disk: whole or not at all, refused before the work, and nothing lost when the disk is full."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from fake_server import FakeServer, response
from PIL import Image

from cxr_triton import cli
from cxr_triton.files import new_folder, write
from cxr_triton.reading import Reading, parse

TEXT = f"<think> {'x' * 4000} </think><answer> Cardiomegaly </answer>"
READING = Reading.of(
    parse(TEXT, grammar="think_answer", answer="labels", labels=("Cardiomegaly",), finish_reason="stop"),
    task="findings", prompt="?", model={}, images=(), usage={}, timings_ms={}, notice="",
)  # fmt: skip


@contextlib.contextmanager
def full_disk(free_bytes: int):
    """No file grows beyond this; the system's error carries no file name, as that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run(*args):
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def verbs(command=cli.main, path=()):
    """Every command, after its words."""
    context = click.Context(command)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from verbs(command.get_command(context, name), (*path, name))
    yield path, command


def test_a_full_disk_is_told_with_the_files_name_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("before")
    path.chmod(0o640)
    with full_disk(1000), pytest.raises(OSError) as raised:
        write(path, "x" * 2000)
    assert raised.value.filename == str(path)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["out.json"]
    write(path, "after")
    assert path.read_text() == "after" and path.stat().st_mode & 0o777 == 0o640


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_a_folder_for_which_there_is_no_room_is_named_and_gone(tmp_path):
    out = tmp_path / "bundle"
    with full_disk(1000), pytest.raises(OSError) as raised, new_folder(out) as partial:
        (partial / "small").write_bytes(bytes(10))
        (partial / "decoder.onnx.data").write_bytes(bytes(2000))
    assert raised.value.filename == str(out) and os.listdir(tmp_path) == []


@pytest.fixture
def png(tmp_path) -> Path:
    Image.linear_gradient("L").save(tmp_path / "chest.png")
    return tmp_path / "chest.png"


def test_a_reading_without_room_is_not_lost(png, tmp_path):
    out = tmp_path / "reading.json"
    with FakeServer(lambda *_: iter([response("", READING.to_json(), final=True)])) as server, full_disk(1000):
        result = run("read", png, "--url", server.url, "--json", out)
    assert result.exit_code == 1
    assert str(out) in result.stderr.splitlines()[-1] and "ulimit -f" in result.stderr
    assert Reading.from_json(result.stdout[result.stdout.index("\n{") :]) == READING
    assert os.listdir(tmp_path) == ["chest.png"]


def test_a_full_standard_output_is_no_bug(png):
    with open("/dev/full", "wb") as full:
        code = "from cxr_triton.cli import main; main(['profiles'])"
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert "No space left on device; free some space" in ended.stderr and "Traceback" not in ended.stderr


WRITES = {"--json", "--html", "--csv", "--log", "--out", "--output", "--dir"}


def written():
    for path, command in verbs():
        for option in command.params:
            if WRITES & set(option.opts):
                yield pytest.param(option, id=" ".join([*path, option.opts[-1]]))


@pytest.mark.parametrize("option", list(written()))
def test_every_output_is_named_alike_and_refused_before_any_work(option, tmp_path, monkeypatch):
    assert not {"--output", "--dir"} & set(option.opts)
    assert ("-o" in option.opts) == ("--out" in option.opts)
    if option.default == "build/demo":
        return  # made as its help says
    context = click.Context(click.Command("verb"))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    wrong = "folder" if option.type.file_okay else "file"
    for value, why in (("new/out", "no folder"), (wrong, f"is a {wrong}"), ("file/out", "no folder")):
        with pytest.raises(click.BadParameter, match=why.replace("folder", "(folder|directory)")):
            option.type_cast_value(context, value)
    assert sorted(os.listdir()) == ["file", "folder"]
    option.type_cast_value(context, "out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(click.BadParameter, match="may not write"):
        option.type_cast_value(context, "out")


def test_verify_refuses_a_bundle_that_no_record_can_be_written_into(tmp_path, monkeypatch):
    for name in ("bundle", "checkpoint", "images"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    result = run(
        "verify", tmp_path / "bundle", "--checkpoint", tmp_path / "checkpoint", "--images", tmp_path / "images"
    )
    assert result.exit_code == 2 and "record goes into the bundle: you may not write" in result.stderr
