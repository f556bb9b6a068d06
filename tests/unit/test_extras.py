"""Optional packages: every verb says what it lacks and how to get it, and what it says is what the project declares."""

import json
import os
import re
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest

from cxr_triton import cli, extras

ROOT = Path(__file__).resolve().parents[2]
PHANTOM = ROOT / "tests" / "phantom"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {  # of distributions that an extra asks for, where the name is not the module's; none are for data
    "aiohttp": "aiohttp",
    "cuda-bindings": "cuda",
    "fontpkg-noto-sans": "fontpkg_noto_sans",
    "fpdf2": "fpdf",
    "numpy": "",
    "nvidia-modelopt": "modelopt",
    "nvidia-pytriton": "pytriton",
    "onnxruntime-gpu": "onnxruntime",
    **{f"opentelemetry-{part}": "opentelemetry" for part in ("api", "exporter-otlp-proto-http", "sdk")},
    "psycopg": "psycopg",
    "pydicom-data": "",
    "rouge-score": "rouge_score",
    "scikit-learn": "sklearn",
    "tensorrt-cu13": "tensorrt",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
    "tritonclient": "google grpc tritonclient",
}
ALL = sorted({module for facts in extras.EXTRAS.values() for module in facts["modules"]})
HIDE = """
import importlib.machinery, sys
hidden, find = set(sys.argv.pop(1).split()), importlib.machinery.PathFinder.find_spec
def find_spec(name, *args, **kwargs):
    return None if name.split(".")[0] in hidden else find(name, *args, **kwargs)
importlib.machinery.PathFinder.find_spec = find_spec
"""
VERB = HIDE + "from cxr_triton.cli import main; main(prog_name='cxr-triton')"
HELPS = f"""{HIDE}
from cxr_triton.cli import main
for verb in sys.argv[1:]:
    main([verb, "--help"], "cxr-triton", standalone_mode=False)
"""
SCRIPT = HIDE + "import os, runpy; path = sys.argv.pop(1); sys.path.insert(0, os.path.dirname(path))\n"
SCRIPT += "runpy.run_path(path, run_name='__main__')"
MODULE = HIDE + "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def ended(code, hidden, *arguments, cwd, **environment) -> subprocess.CompletedProcess:
    """Run `code` in a Python where the `hidden` modules are not installed."""
    command = [sys.executable, "-c", code, " ".join(hidden), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    """What the verbs' arguments below name: enough to come as far as the first import."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("{}")
    (tmp_path / "repository" / "cxr_reader").mkdir(parents=True)
    (tmp_path / "repository" / "cxr_reader" / "config.pbtxt").write_text("")
    (tmp_path / "gateway.yaml").write_bytes((ROOT / "client" / "gateway" / "gateway.yaml").read_bytes())
    return tmp_path


CHECKPOINT = [PHANTOM / "checkpoint", "--profile", PHANTOM / "profile.yaml", "-o", "out"]
CALLS = [
    ("quantize", [*CHECKPOINT, "--scheme", "fp8"]),
    ("export", CHECKPOINT),
    ("build", ["empty", "-o", "out"]),
    ("verify", ["empty", "--checkpoint", "empty", "--images", "empty"]),
    ("make-engine", [*CHECKPOINT, "--recipe", "cpu-int4"]),
    ("package", ["empty", "-o", "out"]),
    ("serve", ["repository"]),
    ("golden", ["empty"]),
    ("read", ["file.json"]),
    ("chat", ["file.json"]),
    ("sr", ["file.json", "-o", "out"]),
    ("gateway", []),
    ("gateway", ["status", "--json", "-"]),
    ("gateway", ["drain"]),
    ("openai", []),
    ("ui", []),
    ("tune", ["repository"]),
    ("bench", ["run", "empty"]),
    ("evaluate", ["file.json", "--format", "table", "--url", "127.0.0.1:1", "-o", "out"]),
    ("archive", ["empty", "--url", "127.0.0.1:1", "-o", "out"]),
    ("demo", []),
]


def says_the_remedy(out: subprocess.CompletedProcess, extra: str) -> bool:
    assert "Traceback" not in out.stderr and "[INTERNAL]" not in out.stderr
    assert out.returncode == 1 and out.stdout == ""
    return extras.remedy(extra) in out.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "arguments"), CALLS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_verb_without_its_packages_names_the_command(folder, verb, arguments):
    out = ended(VERB, ALL, verb, *arguments, cwd=folder)
    assert says_the_remedy(out, cli.VERBS[verb][1])
    assert not (folder / "out").exists()


def test_no_verb_is_left_out_of_these_calls():
    assert {verb for verb, _ in CALLS} == {verb for verb, (_, extra, _) in cli.VERBS.items() if extra}


def test_help_needs_no_extra(tmp_path):
    out = ended(HELPS, ALL, *cli.VERBS, cwd=tmp_path)
    assert out.returncode == 0 and out.stderr == ""
    assert re.findall("^Usage: cxr-triton ([a-z-]+) ", out.stdout, re.MULTILINE) == list(cli.VERBS)
    assert extras.remedy("client") in " ".join(out.stdout.split())


@pytest.mark.parametrize("verb", [verb for verb, (_, extra, _) in cli.VERBS.items() if extra is None])
def test_what_is_listed_needs_no_extra(tmp_path, verb):
    out = ended(VERB, ALL, verb, cwd=tmp_path)
    assert out.returncode == 0 and out.stderr == "" and out.stdout


def test_the_gateway_shows_its_commands_and_its_example_without_its_extra(tmp_path):
    assert re.search(r"^  drain ", ended(VERB, ALL, "gateway", "--help", cwd=tmp_path).stdout, re.MULTILINE)
    example = ended(VERB, ALL, "gateway", "example", cwd=tmp_path)
    assert example.stdout == (ROOT / "client" / "gateway" / "gateway.yaml").read_text()


@pytest.mark.parametrize(("words", "offered"), [("gateway ", "drain"), ("read --", "--help"), ("ga", "gateway")])
def test_completion_needs_no_extra(tmp_path, words, offered):
    line = f"cxr-triton {words}"
    asked = {"_CXR_TRITON_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    out = ended(VERB, ALL, cwd=tmp_path, **asked)
    assert out.stderr == "" and f"plain,{offered}\n" in out.stdout


@pytest.mark.parametrize(
    ("hidden", "verb", "arguments"),
    [
        ("torch", "verify", ["empty", "--checkpoint", "empty", "--images", "empty"]),
        ("transformers", "make-engine", [*CHECKPOINT, "--recipe", "cpu-int4"]),
        ("modelopt", "quantize", [*CHECKPOINT, "--scheme", "fp8"]),
        ("requests", "make-engine", [*CHECKPOINT, "--recipe", "rtx4090-int4"]),
    ],
)
def test_what_comes_last_is_asked_for_first(folder, hidden, verb, arguments):
    """A gate without transformers after an hour of compiling would be too late."""
    out = ended(VERB, [hidden], verb, *arguments, cwd=folder)
    assert says_the_remedy(out, cli.VERBS[verb][1]) and repr(hidden) in out.stderr
    assert not (folder / "out").exists()


def test_comparing_measurements_names_its_extra(folder):
    sys.path.insert(0, str(ROOT / "tests"))
    from bench_results import result

    (folder / "one.json").write_text(json.dumps(result()))
    out = ended(VERB, ALL, "bench", "compare", "one.json", "one.json", cwd=folder)
    assert says_the_remedy(out, "perf")


@pytest.mark.parametrize(
    ("code", "arguments", "extra"),
    [
        (SCRIPT, [PHANTOM / "evaluate.py", "--count", "1"], "export"),
        (SCRIPT, [PHANTOM / "train.py", "-o", "out"], "export"),
        (MODULE, ["cxr_triton.perf.shape", "out", "--tokenizer", PHANTOM / "checkpoint"], "local"),
        (MODULE, ["cxr_triton.perf.gateway", "--objects", "1"], "gateway"),
    ],
    ids=["evaluate", "train", "shape", "gateway"],
)
def test_a_script_without_its_packages_names_the_command(tmp_path, code, arguments, extra):
    out = ended(code, ALL, *arguments, cwd=tmp_path)
    assert says_the_remedy(out, extra)
    assert re.search(r"the package '([\w]+)", out.stderr)[1] in ALL


def test_the_parts_of_a_gpu_session_are_listed_where_none_is_here(tmp_path):
    out = ended(MODULE, ALL, "cxr_triton.perf.gpu_session", "parts", "--json", "-", cwd=tmp_path)
    here = {part["part"]: part["present"] for part in json.loads(out.stdout)["parts"]}
    assert out.returncode == 0 and "Traceback" not in out.stderr
    assert here["torch"] is here["onnxruntime-gpu"] is None and here["click"]


def test_a_missing_module_of_our_own_stays_a_bug(monkeypatch):
    module = types.ModuleType("failing_verb")
    module.verb = cli.click.command("fail")(lambda: __import__("cxr_triton.nothing"))
    monkeypatch.setitem(sys.modules, "failing_verb", module)
    monkeypatch.setitem(cli.VERBS, "fail", ("failing_verb:verb", "local", "Fail."))
    from click.testing import CliRunner

    assert "[INTERNAL] ModuleNotFoundError" in CliRunner().invoke(cli.main, ["fail"]).stderr


def test_a_package_that_does_not_load_says_why_and_names_the_command(monkeypatch):
    def fail():
        raise ImportError("libgomp.so.1: cannot open shared object file", name="onnxruntime.capi")

    module = types.ModuleType("failing_verb")
    module.verb = cli.click.command("fail")(fail)
    monkeypatch.setitem(sys.modules, "failing_verb", module)
    monkeypatch.setitem(cli.VERBS, "fail", ("failing_verb:verb", "export", "Fail."))
    from click.testing import CliRunner

    said = CliRunner().invoke(cli.main, ["fail"]).stderr
    assert "libgomp.so.1" in said and extras.remedy("export") in said


def test_the_gate_records_no_verdict_for_want_of_a_package():
    from cxr_triton.engines.verify.gate import _run

    def part(trial):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    with pytest.raises(ModuleNotFoundError):
        _run(part, None)


def test_the_extra_is_the_verbs_own_or_else_the_first_that_has_the_module():
    assert extras.extra_of("tritonclient.grpc", "perf") == "perf"
    assert extras.extra_of("torch", "perf") == "export"
    assert extras.extra_of("openvino", "local") == "openvino"
    assert extras.extra_of("pydicom.uid") == "objects"
    assert extras.extra_of("rapidjson", "client") == "client"
    assert extras.extra_of("numpy") is None


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ({"url": "file://{}", "dir_info": {"editable": True}}, "run `pip install -e '{}[perf]'`"),
        ({"url": "file://{}", "dir_info": {}}, "run `pip install '{}[perf]'`"),
        ({"url": "file://{}/gone.whl", "archive_info": {}}, "run `pip install -e '.[perf]'` in a clone of cxr-triton"),
        (None, "run `pip install -e '.[perf]'` in a clone of cxr-triton"),
        (metadata.PackageNotFoundError(), "run `pip install -e '.[perf]'` in a clone of cxr-triton"),
    ],
)
def test_the_command_installs_from_where_this_installation_came(monkeypatch, tmp_path, origin, said):
    clone = tmp_path / "a clone"
    clone.mkdir()

    def distributions(name):
        yield types.SimpleNamespace(read_text=lambda file: None)  # what a build left in the folder where one stands
        if not isinstance(origin, Exception):
            text = origin and json.dumps(origin).replace("file://{}", clone.as_uri())
            yield types.SimpleNamespace(read_text=lambda file: text)

    monkeypatch.setattr(metadata, "distributions", distributions)
    assert extras.remedy("perf") == said.format(clone)


def _asked(extra: str) -> tuple[set[str], set[str]]:
    """Extras of its own that an extra asks for, and the modules of the other distributions."""
    taken, modules = set(), set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, extras = re.match(r"([A-Za-z0-9_.-]+)(?:\[([\w,-]+)\])?", requirement).groups()
        if name == "cxr-triton":
            taken |= set(extras.split(","))
        else:
            modules |= set(MODULES.get(name, name.replace("-", "_")).split())
    return taken, modules


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_the_table_of_extras_is_that_of_the_project(extra):
    facts = extras.EXTRAS[extra]
    assert _asked(extra) == (set(facts.get("takes", ())), set(facts["modules"]))


def test_every_extra_is_in_the_table_but_those_that_no_verb_names():
    assert set(PROJECT["optional-dependencies"]) - set(extras.EXTRAS) == {"docs", "serve", "test"}


def test_the_guide_says_which_verb_needs_which_extra():
    guide = (ROOT / "docs" / "install.md").read_text("utf-8")
    rows = re.findall(r"^\| `\[([a-z]+)\]` \| (.*?) \|", guide, re.MULTILINE)
    told = {verb: extra for extra, verbs in rows for verb in re.findall(r"`([a-z-]+)`", verbs)}
    assert told == {verb: extra for verb, (_, extra, _) in cli.VERBS.items() if extra}
    assert {extra for extra, _ in rows} == set(PROJECT["optional-dependencies"]) - {"serve", "test"}


def test_documents_install_from_a_clone():
    """The package is on no index: a bare name would install nothing, or somebody else's package."""
    texts = [
        *ROOT.glob("*.md"),
        ROOT / "deploy" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
    assert [path.name for path in texts if re.search(r"pip install\S* '?cxr-triton", path.read_text())] == []
    parts = "archive", "cxr_triton", "client", "doctor", "engines", "evaluate", "export", "perf", "triton_repo"
    code = [path for part in parts for path in (ROOT / part).rglob("*.py")]
    assert [path.name for path in code if "pip install 'cxr-triton" in path.read_text()] == []


def test_a_python_without_a_local_server_is_told_which_has_one(monkeypatch):
    from cxr_triton.errors import ServerMismatch
    from cxr_triton.triton_repo import serve

    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(serve.sys, "version_info", (3, 13, 0))
    with pytest.raises(ServerMismatch, match=r"Python 3\.13.*use Python 3\.11 or 3\.12"):
        serve.installation()
    monkeypatch.setattr(serve.sys, "version_info", (3, 12, 0))
    with pytest.raises(ServerMismatch, match=re.escape(extras.remedy("local"))):
        serve.installation()
