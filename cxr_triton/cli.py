"""Root of the `cxr-triton` command line; each verb imports its own world only when it is called.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 done but the result is not as asked (each verb says when),
75 busy or not reachable, so worth trying again, 130 interrupted. Every verb takes `json_option`. Commands outside the
root, such as those of `python -m`, end the same way with ``cls=Command`` or ``cls=Group``.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import shlex
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import click

from cxr_triton import __version__
from cxr_triton.errors import CxrError, InternalError, QueueFull, Unavailable, unknown_key
from cxr_triton.extras import extra_of, remedy
from cxr_triton.files import why_not_writable, write

EXIT_FAILED, EXIT_NOT_AS_ASKED, EXIT_TRY_AGAIN, EXIT_INTERRUPTED = 1, 3, 75, 130

VERBS = {
    "profiles": ("cxr_triton.command:profiles", None, "List the models that are known."),
    "tasks": ("cxr_triton.command:tasks", None, "List what the models can be asked."),
    "quantize": ("cxr_triton.export.command:quantize", "quantize", "Quantize a checkpoint, calibrated on images."),
    "export": ("cxr_triton.export.command:export", "local", "Write the vision and decoder graphs of a checkpoint."),
    "recipes": ("cxr_triton.engines.command:recipes", None, "List the GPUs that bundles are built for."),
    "build": ("cxr_triton.engines.command:build", "local", "Compile graphs into an engine bundle."),
    "verify": ("cxr_triton.engines.verify.command:verify", "export", "Hold an engine bundle against its checkpoint."),
    "make-engine": (
        "cxr_triton.triton_repo.command:make_engine",
        "quantize",
        "All of that for a target GPU, in one go.",
    ),
    "package": ("cxr_triton.triton_repo.command:package", "local", "Write a Triton model repository from a bundle."),
    "serve": ("cxr_triton.triton_repo.command:serve", "local", "Run the pip-installed Triton on a model repository."),
    "golden": (
        "cxr_triton.triton_repo.golden:golden",
        "local",
        "Hold a running server against its reference readings.",
    ),
    "read": ("cxr_triton.client.command:read", "client", "Read radiographs through a running server."),
    "chat": ("cxr_triton.client.chat:chat", "client", "Talk about radiographs with a running server."),
    "sr": ("cxr_triton.client.objects.command:sr", "objects", "Write a reading as DICOM SR and FHIR objects."),
    "gateway": (
        "cxr_triton.client.gateway.command:gateway",
        "gateway",
        "Run a PACS gateway: studies in, readings back as DICOM.",
    ),
    "openai": (
        "cxr_triton.client.openai.command:openai",
        "openai",
        "Answer OpenAI's chat completions through a running server.",
    ),
    "ui": ("cxr_triton.client.ui.command:ui", "ui", "Read radiographs in the browser, through a running server."),
    "tune": ("cxr_triton.perf.command:tune", "local", "Measure the settings that serve a repository fastest here."),
    "bench": ("cxr_triton.perf.command:bench", "perf", "Measure a served reader, and compare measurements."),
    "evaluate": (
        "cxr_triton.evaluate.command:evaluate",
        "evaluate",
        "Measure a served reader's accuracy on labelled data.",
    ),
    "archive": (
        "cxr_triton.archive.command:archive",
        "archive",
        "Read an archive through, into Parquet files.",
    ),
    "doctor": ("cxr_triton.doctor.command:doctor", None, "Look at what a deployment needs, and say what to do."),
    "demo": ("cxr_triton.triton_repo.command:demo", "local", "Export, build, package, serve and read on this CPU."),
}
"""verb: (where it is, the extra that it needs or None, what it does)"""

EXAMPLES = {
    "profiles": ("profiles --json profiles.json",),
    "tasks": ("tasks chexone",),
    "quantize": (
        "quantize nvidia/NV-Reason-CXR-3B --profile nv-reason-cxr-3b --scheme fp8 --images radiographs/"
        " --accept-licence -o quantized/",
    ),
    "export": ("export nvidia/NV-Reason-CXR-3B --profile nv-reason-cxr-3b --accept-licence -o export/",),
    "recipes": ("recipes", "recipes rtx4090-int4"),
    "build": ("build export/ -o bundle/", "build export/ --recipe rtx4090-int4 -o bundle/"),
    "verify": ("verify bundle/ --checkpoint checkpoint/ --images radiographs/ --html verification.html",),
    "make-engine": (
        "make-engine nvidia/NV-Reason-CXR-3B --profile nv-reason-cxr-3b --recipe rtx4090-int4 --accept-licence"
        " -o engine/",
    ),
    "package": ("package bundle/ -o repository/",),
    "serve": ("serve repository/",),
    "golden": ("golden engine/ --url 127.0.0.1:8001",),
    "read": (
        "read chest.dcm --html reading.html --json reading.json",
        "read prior.dcm current.dcm --task progression",
        "read radiographs/ -o readings/",
        'read chest.dcm --follow reading.json "Provide differentials."',
    ),
    "chat": ("chat chest.dcm",),
    "sr": ("sr chest.dcm --reading reading.json -o objects/",),
    "gateway": ("gateway --config gateway.yaml",),
    "gateway run": ("gateway run --config gateway.yaml",),
    "gateway worklist": ("gateway worklist --config gateway.yaml",),
    "gateway example": ("gateway example > gateway.yaml",),
    "gateway status": ("gateway status", "gateway status 12"),
    "gateway retry": ("gateway retry 12",),
    "gateway drop": ("gateway drop 12",),
    "gateway drain": ("gateway drain --timeout-s 600",),
    "openai": (
        "openai --url 127.0.0.1:8001",
        "openai --host 0.0.0.0 --cert cert.pem --key key.pem --api-keys-file keys",
    ),
    "ui": (
        "ui --url 127.0.0.1:8001 --open",
        "ui --url 127.0.0.1:8001 --url 127.0.0.1:9001",
        "ui --host 0.0.0.0 --cert cert.pem --key key.pem --password-file password",
    ),
    "tune": ("tune repository/", "tune bundle/ --streams 4 --dry-run --json tune.json"),
    "bench": ("bench run repository/ --json result.json",),
    "bench run": (
        "bench run repository/ --json result.json --html result.html",
        "bench run --url 127.0.0.1:8001 --scenario server --rates 0.5,1",
    ),
    "bench compare": ("bench compare before.json after.json",),
    "bench history": ("bench history results/ --html history.html",),
    "evaluate": ("evaluate run data.yaml repository/ -o result.jsonl",),
    "evaluate judge": ("evaluate judge result.jsonl --limit f1_macro=0.7 --against before.jsonl",),
    "evaluate run": (
        "evaluate run data.yaml repository/ -o result.jsonl",
        "evaluate run ChestX-ray14/ --format nih --url 127.0.0.1:8001 --limit 500 -o result.jsonl",
    ),
    "evaluate measure": (
        "evaluate measure result.jsonl --html result.html",
        "evaluate measure after.jsonl --against before.jsonl --images ChestX-ray14/ --html result.html",
    ),
    "archive": (
        "archive radiographs/ --url 127.0.0.1:8001 -o rows/",
        "archive 'radiographs/**/*.dcm' --url 127.0.0.1:8001 --url 127.0.0.1:9001 --actors 2 -o rows/",
        "archive 'https://pacs.example/dicom-web/studies?StudyDate=20260101-&ModalitiesInStudy=DX'"
        " --url 127.0.0.1:8001 -o rows/",
        "archive radiographs/ --in-process bundle/ -o rows/ --html rows.html",
    ),
    "doctor": ("doctor", "doctor repository/ --url 127.0.0.1:8001 --gateway gateway.yaml"),
    "demo": ("demo -o build/demo",),
}
"""Of each command, as they stand under its help."""


def printable(text: str) -> str:
    r"""`text` that cannot steer a terminal: control, direction and other invisible characters become ``\x1b`` and such.

    Line feeds and tabs stay. Text of a model, a server or a file goes through here before it is printed.
    """
    return "".join(c if c in "\n\t" or not _steers(c) else ascii(c)[1:-1] for c in text)


def _steers(character: str) -> bool:
    """Control, format (of direction, for instance), surrogate, private or not assigned."""
    return unicodedata.category(character)[0] == "C"


def printable_json(result: object) -> str:
    r"""`result` as JSON that cannot steer a terminal; what `printable` escapes is ``\u009b`` and such, the same."""
    text = _SHORT_LIST.sub(_one_line, json.dumps(result, indent=2, ensure_ascii=False))
    return "".join(c if c == "\n" or not _steers(c) else json.dumps(c)[1:-1] for c in text)


class Output(click.Path):
    """A file or folder that a verb writes: refused before any work where it cannot be. Its folder has to be there."""

    def convert(self, value, param, ctx):
        """As `click.Path`, and where the file can be written only."""
        path = super().convert(value, param, ctx)
        if str(path) != "-" and (why := why_not_writable(Path(os.fsdecode(path)))):
            self.fail(printable(why), param, ctx)
        return path


OUT_FILE = Output(dir_okay=False, writable=True, path_type=Path)
OUT_FOLDER = Output(file_okay=False, writable=True, path_type=Path)

json_option = click.option(
    "--json",
    "json_path",
    metavar="PATH|-",
    type=Output(dir_okay=False, writable=True, allow_dash=True),
    help="Write the result as JSON; with - it is all that goes to standard output.",
)
_PEM = click.Path(exists=True, dir_okay=False, path_type=Path)


def access_options(command):
    """How a verb is let in by a server or the front door before it; `cxr_triton.client.limits.Access.of` takes them."""
    options = (
        click.option(
            "--tls-ca", type=_PEM, metavar="PEM", help="Encrypt, and trust servers that these authorities signed."
        ),
        click.option(
            "--tls-cert", type=_PEM, metavar="PEM", help="This client's certificate, where the server asks for one."
        ),
        click.option("--tls-key", type=_PEM, metavar="PEM", help="The key of --tls-cert."),
        click.option(
            "--token-file",
            type=_PEM,
            metavar="FILE",
            envvar="CXR_TRITON_TOKEN_FILE",
            show_envvar=True,
            help="A bearer token, where a front door asks for one.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def trace_option(command):
    """Where a verb's spans go, as `cxr_triton.client.otlp.start` and `cxr_triton.triton_repo.serve.Server` take it."""
    return click.option(
        "--trace-otlp",
        metavar="URL",
        help="Send spans to this collector, http://HOST:4318 (docs/traces.md).  [default: OTEL_EXPORTER_OTLP_ENDPOINT]",
    )(command)


_SHORT = r'(?:[-+.\w]+|"[-. \w]{0,20}")'
_SHORT_LIST = re.compile(rf"\[\n\s*({_SHORT}(?:,\n\s*{_SHORT})*)\n\s*\]")


def _one_line(found: re.Match[str]) -> str:
    """A list of numbers and short words in one line; inside a JSON string there is no line feed."""
    return "[" + re.sub(r",\n\s*", ", ", found[1]) + "]"


def write_json(result: dict, path: str | None) -> None:
    """Write a verb's result where `json_option` says; nothing when it was not given.

    A result that its file has no room for goes to standard output, so that no work is lost.
    """
    if path is None:
        return
    text = printable_json(result) + "\n"
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        write(path, text)
    except OSError:
        click.echo(f"{printable(path)} could not be written; the result goes to standard output instead", err=True)
        click.echo(text, nl=False)
        raise


_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or write to another disk",
    errno.EROFS: "write to another disk",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "see its permissions, or choose another place"),
    errno.ENOENT: "see how it is spelled",
}


def _said(error: OSError) -> str:
    """An operating system's error in one line: what, where, what to do."""
    what = error.strerror or str(error)
    where = f": {error.filename}" if error.filename else ""
    remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
    return printable(what + where + remedy)


def say_next(*command: str | Path) -> None:
    """What to run next, on standard error; capitals are for the user to fill in."""
    click.echo(f"next: {printable(shlex.join(['cxr-triton', *map(str, command)]))}", err=True)


class Waiting:
    """What a verb waits for and how long it has, in a line of the terminal on standard error that goes when it ends.

    Elsewhere nothing is written. `what` may change on the way.
    """

    def __init__(self, what: str):
        self.what = what
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cxr-waiting", daemon=True)

    def __enter__(self) -> Waiting:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self.end()

    def end(self) -> None:
        """Remove the line."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        started_s = time.monotonic()
        while not self._ended.wait(0.5):
            elapsed_s = time.monotonic() - started_s
            click.echo(f"\r\x1b[K{printable(self.what)}, {elapsed_s:.0f} s", nl=False, err=True)
        click.echo("\r\x1b[K", nl=False, err=True)


class _Plain(click.ClickException):
    """A failure, said as every other is."""

    def show(self, file=None):
        click.echo(f"error: {printable(self.format_message())}", file or sys.stderr)


class Failure(_Plain):
    """A verb's failure as one line with its code; never a traceback."""

    def __init__(self, error: CxrError):
        trace = f" (trace {error.trace_id})" if error.trace_id else ""
        super().__init__(f"[{error.code}] {' '.join(printable(error.message).split())}{trace}")


class Busy(Failure):
    """A failure that may be gone when the verb is tried again."""

    exit_code = EXIT_TRY_AGAIN


class _Usage(click.UsageError):
    """Wrong usage, said as every other error is."""

    def show(self, file=None):
        if self.ctx:
            click.echo(f"{self.ctx.get_usage()}\nTry '{self.ctx.command_path} --help' for help.\n", file or sys.stderr)
        click.echo(f"error: {printable(self.format_message())}", file or sys.stderr)


@contextlib.contextmanager
def _alike() -> Iterator[None]:
    """Click writes ``Error:``, and its own help where no argument was given."""
    try:
        yield
    except (_Usage, _Plain, click.exceptions.NoArgsIsHelpError):
        raise
    except click.UsageError as error:
        raise _Usage(error.format_message(), error.ctx) from None
    except click.ClickException as error:
        raise _Plain(error.format_message()) from None


def _as_verb(command: click.Command, path: str) -> click.Command:
    """With its examples, and with the root's names of help also where it is called without the root."""
    command.context_settings.setdefault("help_option_names", main.context_settings["help_option_names"])
    lines = [f"  cxr-triton {line}" for line in EXAMPLES.get(path, ())]
    if lines:
        command.epilog = "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *lines])
    for name, inner in getattr(command, "commands", {}).items():
        _as_verb(inner, f"{path} {name}")
    return command


def names(listed: str):
    """Completion of an option or argument by the names that ``MODULE:FUNCTION`` lists, else by files."""

    def complete(context, parameter, incomplete):
        from click.shell_completion import CompletionItem

        module, function = listed.split(":")
        found = [name for name in getattr(importlib.import_module(module), function)() if name.startswith(incomplete)]
        return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]

    return complete


PROFILES, RECIPES = names("cxr_triton.profile:profile_names"), names("cxr_triton.engines.recipe:recipe_names")
TASKS, MODES = names("cxr_triton.command:task_names"), names("cxr_triton.command:mode_names")


class MissingPackage(_Plain):
    """A package of an extra is not here, or does not load."""

    def __init__(self, error: ImportError, command: str | None, extra: str | None):
        said = "" if isinstance(error, ModuleNotFoundError) else f", which does not load ({error})"
        what, how = f"`{command}` needs" if command else "this needs", remedy(extra_of(str(error.name), extra))
        super().__init__(printable(f"{what} the package {error.name!r}{said}; {how}"))

    @staticmethod
    def is_of(error: ImportError) -> bool:
        """The import is of somebody else's package; one of our own that fails is a bug."""
        return (error.name or "cxr_triton").split(".")[0] != "cxr_triton"


class Command(click.Command):
    """A command, which may need `extra`; it fails in one line with its code and exit status, never in a traceback."""

    def __init__(self, *args, extra: str | None = None, **options):
        super().__init__(*args, **options)
        self.extra = extra

    def make_context(self, info_name, args, parent=None, **extra):
        """Parse; wrong usage is said as every other error."""
        with _alike():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx):
        """Call, and say what failed."""
        with _alike():
            return self._invoke(ctx)

    def _invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except CxrError as error:
            raise (Busy if isinstance(error, QueueFull | Unavailable) else Failure)(error) from None
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except OSError as error:
            raise _Plain(_said(error)) from None
        except Exception as error:
            if os.environ.get("CXR_TRITON_DEBUG"):
                raise
            if isinstance(error, ImportError) and MissingPackage.is_of(error):
                raise self.missing(error, ctx) from None
            message = f"{type(error).__name__}: {error}; set CXR_TRITON_DEBUG=1 to see where"
            raise Failure(InternalError(message)) from None

    def missing(self, error: ImportError, ctx: click.Context) -> MissingPackage:
        """What says that a package of this command is not here."""
        return MissingPackage(error, None, self.extra)


class Group(Command, click.Group):
    """A group that fails as a `Command`."""


class LazyGroup(Group):
    """A group whose commands are named in `VERBS` and imported on use."""

    def list_commands(self, ctx):
        """The verbs, in the order in which they are used."""
        return list(VERBS)

    def get_command(self, ctx, name):
        """A verb from its module, or what stands for it where a package is missing."""
        if name not in VERBS:
            return None
        path, extra, text = VERBS[name]
        module, attribute = path.split(":")
        try:
            return _as_verb(getattr(importlib.import_module(module), attribute), name)
        except ImportError as error:
            if not MissingPackage.is_of(error):
                raise
            return NotInstalled(name, text, MissingPackage(error, name, extra))

    def missing(self, error, ctx):
        """Of the verb that was called."""
        verb = ctx.invoked_subcommand
        return MissingPackage(error, verb, VERBS[verb][1])

    def resolve_command(self, ctx, args):
        """The verb that is called; an unknown one is told the nearest."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            ctx.fail(unknown_key(args[0], VERBS, "cxr-triton").replace("key", "command", 1))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx, formatter):
        """The verbs without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in VERBS.items()])


class NotInstalled(click.Command):
    """A verb whose packages are not here: its help says what it is for and how to get it, all else fails so."""

    def __init__(self, name: str, text: str, missing: MissingPackage):
        options = {"ignore_unknown_options": True, "allow_extra_args": True}
        super().__init__(name, help=f"{text}\n\nNot installed: {missing.message}", context_settings=options)
        self._missing = missing

    def invoke(self, ctx):
        """Fail, and say which command brings the packages."""
        raise self._missing


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cxr-triton")
def main():
    """Chest X-ray reasoning models: checkpoint to a served, measured Triton ensemble.

    The models' weights are for non-commercial research only and never for diagnosis.
    """


def call(*words: str | Path) -> int:
    """Another verb as if it had been typed; its exit status. Errors are raised as they are."""
    try:
        main([str(word) for word in words], "cxr-triton", standalone_mode=False)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_FAILED
    return 0
