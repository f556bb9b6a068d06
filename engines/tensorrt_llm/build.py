"""Build the decoder's engine with TensorRT-LLM's `trtllm-build`: command line, run, log, what went wrong.

Flags and log lines are those of TensorRT-LLM 1.2 (`commands/build.py`, `builder.py`, `plugin/plugin.py`). Not run on
TensorRT-LLM here: tests run a stand-in of the tool.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cxr_triton.engines.build import Job
from cxr_triton.engines.container import in_container, located_recipe
from cxr_triton.engines.digest import sha256
from cxr_triton.engines.geometry import Geometry
from cxr_triton.engines.interface import Compiled
from cxr_triton.engines.plan_cache import built
from cxr_triton.engines.recipe import Recipe
from cxr_triton.engines.tensorrt import ENGINE as TENSORRT
from cxr_triton.engines.tensorrt.compiler import CONTAINER_TENSORRT, container_match
from cxr_triton.engines.tensorrt.library import Target, released
from cxr_triton.engines.tensorrt_llm.layout import CONTAINERS, FILES, FOLDER, NAME, step_tokens
from cxr_triton.errors import BuildFailed, DeviceUnavailable, InvalidBundle, InvalidRequest, UnsupportedCheckpoint
from cxr_triton.export.safetensors import read_header
from cxr_triton.profile import load_profile

TOOL = "trtllm-build"
TOKENS_PER_BLOCK = 32  # of the paged KV cache
STOP_TIMEOUT_S = 10
_TAIL_LINES = 200
_PR_SET_PDEATHSIG = 1

PHASES = (
    ("loads the checkpoint", re.compile(r"TensorRT-LLM version:|Set gpt_attention_plugin to")),
    ("writes the network", re.compile(r"\[TRT\] \[I\] .*Init builder kernel library|Set nccl_plugin to")),
    ("fills in weights", re.compile(r"Total time of constructing network")),
    ("chooses kernels", re.compile(r"Build TensorRT engine ")),
    ("serializes", re.compile(r"Engine generation completed|Total time of building Unnamed")),
    ("writes the engine", re.compile(r"Serializing engine to ")),
    ("done", re.compile(r"Total time of building all engines")),
)
"""What the tool does from the line on that the pattern finds in its log, in the order in which they come."""

_NO_GPU = "No CUDA GPUs are available|no CUDA-capable device|Found no NVIDIA driver|CUDA driver version is insufficient"
_FAILURES = (
    (
        _NO_GPU,
        "it finds no GPU, or its driver is too old; run the container with --gpus all, on a host with its driver",
    ),
    (
        r"unrecognized arguments|invalid choice|the following arguments are required",
        "it does not know these flags, so it is of another version; use the recipe's container",
    ),
    (
        r"libnvinfer\S*: cannot open shared object|undefined symbol|[Pp]lugin (?:creator )?(?:\S+ )?not found"
        r"|TensorRT-LLM Plugin is unavailable|libnvinfer_plugin_tensorrt_llm|getPluginCreator could not find",
        "TensorRT and TensorRT-LLM with its plugins do not belong together; use the recipe's container as it is",
    ),
    (
        r"not supported on SM|[Uu]nsupported SM|Unknown SM|no kernel image is available|Unsupported (?:GPU )?arch",
        "this GPU has no kernels for the recipe's precision; choose another precision, or a recipe for this GPU",
    ),
    (
        r"Required but not provided tensors|Unsupported model architecture|not the same shape as the original"
        r"|KeyError: '(?:architecture|dtype|quantization|transformer\.)|SafetensorError|Error while deserializing",
        "the checkpoint is not one that it takes; export again with this version of cxr-triton",
    ),
    (
        r"No space left on device",
        "the disk is full; the engine takes as much room as its weights: free some, or choose another folder",
    ),
    (
        r"OutOfMemory|[Oo]ut of memory|could not be allocated|insufficient memory on requested size",
        "the GPU's memory is full; stop what else runs there, or lower slots or max_sequence of the recipe",
    ),
    (
        r"MemoryError|Cannot allocate memory|bad_alloc",
        "the host's memory is full; give the container more of it",
    ),
    (
        r"Could not find any implementation for node",
        "TensorRT has no kernel for this layer on this GPU, or no memory to try one; free the GPU, or choose another "
        "precision",
    ),
)
"""Pattern in the log, and what to do; the first that matches."""
_NO_ERROR = re.compile(r"\] \[[VIW]\] ")  # TensorRT warns of every tactic that it has no memory for, and goes on


@dataclass(frozen=True)
class Tool:
    """A `trtllm-build` that can be run, and what it stands on."""

    path: Path
    tensorrt_llm: str
    tensorrt: str


def flags(recipe: Recipe, *, max_sequence: int, image_rows: int) -> dict[str, str]:
    """Flags of `trtllm-build` but for folders and files, in their order.

    Parameters
    ----------
    recipe : Recipe
    max_sequence : int
        Prompt and answer of a request in tokens: the recipe's, or less where the export has less.
    image_rows : int
        Image tokens of one request at most.
    """
    decoder = recipe.decoder
    limits = {
        "max_batch_size": recipe.slots,
        "max_num_tokens": min(step_tokens(recipe.slots, recipe.max_sequence), recipe.slots * max_sequence),
        "max_input_len": max_sequence - 1,  # ignored where padding is removed; says what our front end keeps to
        "max_seq_len": max_sequence,
        "max_beam_width": 1,
        "max_multimodal_len": recipe.slots * image_rows,
    }
    plugins = {
        "kv_cache_type": "paged",
        "tokens_per_block": TOKENS_PER_BLOCK,
        "remove_input_padding": "enable",
        "gpt_attention_plugin": "auto",
        # "On FP8, it's recommended to be disabled" (performance/perf-best-practices); AWQ has a plugin of its own.
        "gemm_plugin": "disable" if decoder.precision == "fp8" else "auto",
        "context_fmha": "enable",
        "use_paged_context_fmha": "enable",
        # With paged context attention TensorRT-LLM takes FP8 attention with an FP8 cache, and only then.
        "use_fp8_context_fmha": "enable" if decoder.kv == "fp8" else "disable",
        # A fused FP8 MLP gives both of its halves one scale, which is not what was calibrated and verified.
        "use_fused_mlp": "disable" if decoder.precision == "fp8" else "enable",
        "multiple_profiles": "enable",
    }
    return {name: str(value) for name, value in {**limits, **plugins, "workers": 1, "log_level": "info"}.items()}


def command(tool: str | Path, checkpoint: Path, out: Path, chosen: dict[str, str], timing: dict[str, Path]) -> list:
    """The whole command line; `timing` holds files by ``input_timing_cache`` and ``output_timing_cache``."""
    folders = {"checkpoint_dir": checkpoint, "output_dir": out}
    pairs = {**folders, **chosen, **timing}.items()
    return [str(tool), *(part for name, value in pairs for part in (f"--{name}", str(value)))]


def check_machine(recipe: Recipe) -> tuple[Tool, Target]:
    """The tool and the GPU that build for a recipe.

    Raises
    ------
    DeviceUnavailable
        The tool, the GPU or TensorRT's package is missing, or of another version or kind than the recipe's.
    """
    tool = find_tool(recipe)
    if released(ours := TENSORRT.library.load("vision").__version__) != released(tool.tensorrt):
        raise DeviceUnavailable(
            f"the vision engine would be built by TensorRT {ours}, the decoder by {tool.tensorrt}; both run in "
            f"{recipe.container}: install cxr-triton there so that it sees the container's tensorrt package"
        )
    return tool, TENSORRT.library.target(recipe)


def find_tool(recipe: Recipe) -> Tool:
    """`trtllm-build` on the path, of the versions that the recipe's container has.

    Raises
    ------
    DeviceUnavailable
        There is none, it does not start, or it is of other versions.
    """
    remedy = f"run this in {recipe.container}: --print shows the command; or choose a recipe for another compiler"
    found = shutil.which(TOOL)
    if found is None:
        raise DeviceUnavailable(f"{TOOL} is not on the path; {remedy}")
    code = "import importlib.metadata as m, tensorrt as t; print('versions', m.version('tensorrt_llm'), t.__version__)"
    line = [*_interpreter(Path(found)), "-c", code]
    try:
        asked = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceUnavailable(f"the Python of {found} cannot be run ({type(error).__name__}); {remedy}") from None
    said = re.search(r"^versions (\S+) (\S+)$", asked.stdout, re.MULTILINE)
    if said is None:
        last = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        raise DeviceUnavailable(f"{found} stands on no TensorRT-LLM with TensorRT ({last[:200]}); {remedy}")
    tool = Tool(Path(found), *said.groups())
    _check_versions(tool, recipe, remedy)
    return tool


def _check_versions(tool: Tool, recipe: Recipe, remedy: str) -> None:
    tag = recipe.tag
    for name, has, wanted in (
        ("TensorRT-LLM", tool.tensorrt_llm, CONTAINERS[tag]),
        ("TensorRT", tool.tensorrt, CONTAINER_TENSORRT[tag]),
    ):
        if released(has) != wanted:
            raise DeviceUnavailable(
                f"{tool.path} is of {name} {has}, {tag} has {wanted}, and an engine runs in the version that built it "
                f"only; {remedy}"
            )


def _interpreter(script: Path) -> list[str]:
    """What runs a script that pip installed."""
    with open(script, "rb") as file:
        line = file.readline(1024).decode(errors="replace").strip()
    return shlex.split(line[2:]) if line.startswith("#!") else ["python3"]


@dataclass(frozen=True)
class DecoderBuild:
    """One decoder that is about to be built.

    Attributes
    ----------
    job : Job
    checkpoint : Path
        Folder with `config.json` and `rank0.safetensors`.
    flags : dict
        See `flags`.
    tool : Tool
    target : Target
    """

    job: Job
    checkpoint: Path
    flags: dict[str, str]
    tool: Tool
    target: Target

    @classmethod
    def prepare(cls, job: Job) -> DecoderBuild:
        """Check everything that can be checked before the first minute of building; errors as `Engine.prepare`."""
        return cls(job, *asked(job.source, job.geometry, job.recipe), *check_machine(job.recipe))

    @property
    def log(self) -> Path:
        """What the tool says, beside the bundle."""
        return self.job.out.with_name(f"{self.job.out.name}.{TOOL}.log")

    def run(self, bundle: Path) -> Compiled:
        """Put the engine into a bundle's folder, from the cache of plans if it is there."""
        versions = {NAME: self.tool.tensorrt_llm, TENSORRT.name: self.tool.tensorrt}
        container = container_match(self.job.recipe.container, self.tool.tensorrt)
        return Compiled(versions, self._report(bundle / FOLDER), container)

    def _report(self, folder: Path) -> dict:
        """Keys of `tensorrt.compiler.compile_graph`'s report and those of `build_engine`."""
        weights, config = self.checkpoint / "rank0.safetensors", folder / "config.json"
        tool = {"tensorrt_llm": self.tool.tensorrt_llm, "tensorrt": self.tool.tensorrt}
        target = dataclasses.asdict(self.target)

        def inputs() -> dict:
            digests = [sha256(path, self.job.progress) for path in (self.checkpoint / config.name, weights)]
            return {"checkpoint": digests, "flags": self.flags, **tool, **target}

        def build() -> dict:
            name = f"timing-{TOOL}-{self.tool.tensorrt}-{self.target.compute_capability}.cache"
            times = self.job.cache / name if self.job.cache else None
            return {
                "engine": NAME,
                "version": self.tool.tensorrt_llm,
                "tensorrt": self.tool.tensorrt,
                **target,
                "weights_bytes": weights.stat().st_size,
                **build_engine(self.tool, self.checkpoint, folder, self.flags, log=self.log, timing_cache=times),
                "config": config.read_text(encoding="utf-8"),
            }

        folder.mkdir()
        report = built(self.job.cache, folder / "rank0.engine", inputs, build)
        config.write_text(report.pop("config"), encoding="utf-8")
        return report


def asked(export: Path, geometry: Geometry, recipe: Recipe) -> tuple[Path, dict[str, str]]:
    """The checkpoint of an export folder and the flags that a recipe builds it with; errors as `prepare`."""
    checkpoint = export / "decoder"
    check_checkpoint(read_checkpoint(checkpoint), recipe)
    images = load_profile(export / "profile.yaml").max_images
    if recipe.image_budget < images:
        raise InvalidRequest(
            f"recipe {recipe.name} has an image_budget of {recipe.image_budget}, the profile allows {images} images in "
            "a request, which go through the vision engine together; raise image_budget"
        )
    return checkpoint, flags(recipe, max_sequence=geometry.max_sequence, image_rows=images * geometry.token_budget)


def commands(job: Job, named: str) -> dict[str, tuple[str, list | str]]:
    """The tool's command line, and that of the whole bundle in the recipe's container; see `Engine.commands`."""
    recipe, source = job.recipe, located_recipe(named)
    checkpoint, chosen = asked(job.source, job.geometry, recipe)
    build = ["build", job.source, "-o", job.out, "--recipe", source, "--no-cache"]
    read = [job.source, *([source] if isinstance(source, Path) else [])]
    image = f"the whole bundle, in {recipe.container} (deploy/README.md makes the image)"
    return {
        "trtllm_build": (
            f"the decoder alone, where {TOOL} is on the path",
            command(TOOL, checkpoint, job.out / FOLDER, chosen, {}),
        ),
        "docker": (image, in_container(recipe, build, read=read, write=job.out.parent)),
    }


def read_checkpoint(folder: Path) -> dict:
    """`config.json` of the checkpoint; raises `InvalidBundle` where it is none of TensorRT-LLM's."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        quantization = config["quantization"]
        config["max_position_embeddings"], quantization["quant_algo"], quantization["kv_cache_quant_algo"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidBundle(
            f"{folder} holds no checkpoint of TensorRT-LLM ({type(error).__name__}: {error}); write one with "
            "`cxr-triton export --format tensorrt-llm`"
        ) from None
    if not (folder / "rank0.safetensors").is_file():
        raise InvalidBundle(f"rank0.safetensors is missing in {folder}; export again")
    try:
        read_header(folder / "rank0.safetensors")
    except UnsupportedCheckpoint as error:
        raise InvalidBundle(f"{error.message.rpartition(';')[0]}; export again") from None
    return config


def check_checkpoint(config: dict, recipe: Recipe) -> None:
    """Refuse a checkpoint that is not what the recipe builds.

    Raises
    ------
    InvalidRequest
    """
    held = (config["quantization"]["kv_cache_quant_algo"] or "bf16").lower()
    if held != recipe.decoder.kv:
        with_scales = "with" if recipe.decoder.kv == "fp8" else "without"
        raise InvalidRequest(
            f"the checkpoint asks for a KV cache in {held}, recipe {recipe.name} for {recipe.decoder.kv}; quantize "
            f"{with_scales} --kv-fp8, or change decoder.kv"
        )
    if config["max_position_embeddings"] > recipe.max_sequence:
        raise InvalidRequest(
            f"the checkpoint has {config['max_position_embeddings']} positions, recipe {recipe.name} "
            f"{recipe.max_sequence}; every request would carry the M-RoPE table of all of them: export with "
            f"--max-sequence {recipe.max_sequence}"
        )


def build_engine(
    tool: Tool,
    checkpoint: Path,
    out: Path,
    chosen: dict[str, str],
    *,
    log: Path,
    timing_cache: Path | None = None,
    progress: bool | None = None,
) -> dict:
    """Run `trtllm-build`.

    Parameters
    ----------
    tool : Tool
    checkpoint : Path
        Folder with `config.json` and `rank0.safetensors`.
    out : Path
        Gets `config.json` and `rank0.engine`; is removed where the build fails or is interrupted.
    chosen : dict
        Of `flags`.
    log : Path
        Everything that the tool says, written as it comes.
    timing_cache : Path, optional
        Kernel times, read if present and written back.
    progress : bool, optional
        Show a bar on standard error; by default on a terminal.

    Returns
    -------
    dict
        ``command`` (with folders as in export and bundle; the log has them in full), ``seconds``, ``phases_s`` (by what
        the tool did), ``bytes`` of the engine, ``changed`` (settings that the tool changed of its own: name, asked and
        built).

    Raises
    ------
    DeviceUnavailable
        There is no GPU that it can use.
    BuildFailed
        Anything else; names the cause, the remedy and the log.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "timing.cache"
    timing = {"output_timing_cache": kept}
    if timing_cache is not None and timing_cache.is_file():
        timing["input_timing_cache"] = timing_cache
    line = command(tool.path, checkpoint.resolve(), out.resolve(), chosen, timing)
    started_s = time.monotonic()
    try:
        code, phases_s, tail = _run(line, log, progress)
        if code:
            raise _failure(code, tail, log)
        changed = _check_engine(out, chosen, tool, log)
        if timing_cache is not None and kept.is_file():
            timing_cache.parent.mkdir(parents=True, exist_ok=True)
            partial = timing_cache.with_name(f".{timing_cache.name}.{os.getpid()}")
            shutil.copyfile(kept, partial)
            os.replace(partial, timing_cache)
        for file in out.iterdir():
            if file.name not in FILES:
                file.unlink()
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return {
        "command": command(TOOL, Path("decoder"), Path(FOLDER), chosen, {}),
        "seconds": round(time.monotonic() - started_s, 1),
        "phases_s": phases_s,
        "bytes": (out / "rank0.engine").stat().st_size,
        "changed": changed,
    }


def _run(line: list[str], log: Path, progress: bool | None) -> tuple[int, dict[str, float], list[str]]:
    """Exit status, seconds of each phase, and the last lines of the log."""
    from tqdm import tqdm

    libc = ctypes.CDLL(None)
    bar = tqdm(total=len(PHASES), desc=TOOL, unit="phase", disable=None if progress is None else not progress)
    phases_s: dict[str, float] = {}
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    phase, since_s = -1, time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with _stopped_by_sigterm(), bar, open(log, "w", encoding="utf-8") as file:
        file.write(shlex.join(line) + "\n")
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            # It never outlives this process.
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509 (one system call)
        )
        try:
            for said in process.stdout or ():
                file.write(said)
                file.flush()
                tail.append(said.rstrip())
                reached = next((i for i, (_, sign) in enumerate(PHASES) if i > phase and sign.search(said)), None)
                if reached is not None:
                    if phase >= 0:
                        phases_s[PHASES[phase][0]] = round(time.monotonic() - since_s, 1)
                    bar.update(reached - phase)
                    phase, since_s = reached, time.monotonic()
                    bar.set_description(f"{TOOL} {PHASES[phase][0]}")
            return process.wait(), phases_s, list(tail)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """End the tool with everything that it started."""
    try:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
    finally:  # whoever is in a hurry presses Ctrl-C again
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the process by an exception meanwhile, so that the tool ends too and nothing half-built stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failure(code: int, tail: list[str], log: Path) -> BuildFailed | DeviceUnavailable:
    text = "\n".join(line for line in tail if not _NO_ERROR.search(line))
    for pattern, remedy in _FAILURES:
        error = DeviceUnavailable if pattern == _NO_GPU else BuildFailed
        if found := re.search(f"^.*(?:{pattern}).*$", text, re.MULTILINE):
            return error(f"{TOOL} failed: {_shortened(found[0])}; {remedy}; the log is {log}")
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return BuildFailed(
            f"{TOOL} was killed, as the kernel does where the host's memory is full; give the container more of it; "
            f"the log is {log}"
        )
    said = next((line for line in reversed(tail) if line.strip()), "it said nothing")
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    return BuildFailed(f"{TOOL} ended with {how}: {_shortened(said)}; see {log}")


def _shortened(line: str) -> str:
    return line.strip() if len(line) <= 300 else line.strip()[:300] + "…"


def _check_engine(out: Path, chosen: dict[str, str], tool: Tool, log: Path) -> list[dict]:
    """Hold what was built against what was asked for; gives settings that the tool changed of its own.

    Raises
    ------
    BuildFailed
        No engine, or one with other limits, without paged cache or M-RoPE, or of another version.
    """
    from cxr_triton.engines.tensorrt_llm.request import EngineConfig

    engine = out / "rank0.engine"
    if not engine.is_file() or not engine.stat().st_size:
        raise BuildFailed(f"{TOOL} said that it was done and left no rank0.engine; see {log}")
    try:
        EngineConfig.read(out)
        whole = json.loads((out / "config.json").read_bytes())
        build, plugins = whole["build_config"], whole["build_config"]["plugin_config"]
        has = {name: build[name] for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width")}
        has |= {"max_multimodal_len": build["max_prompt_embedding_table_size"]}
        has |= {"kv_cache_type": str(build["kv_cache_type"]).lower()}
        version, mrope = whole["version"], build["use_mrope"]
    except (InvalidBundle, OSError, ValueError, KeyError, TypeError) as error:
        raise BuildFailed(f"{TOOL} left a config.json that is none of an engine ({error}); see {log}") from None
    if other := [f"{name} {value}, not {chosen[name]}" for name, value in has.items() if str(value) != chosen[name]]:
        raise BuildFailed(f"{TOOL} built something else than was asked for: {', '.join(other)}; see {log}")
    if not mrope:
        raise BuildFailed(f"{TOOL} built an engine without M-RoPE; export again; see {log}")
    if released(version) != released(tool.tensorrt_llm):
        raise BuildFailed(f"the engine is of TensorRT-LLM {version}, {tool.path} of {tool.tensorrt_llm}; see {log}")
    changed = []
    for name, asked in chosen.items():
        if name in plugins and asked in ("enable", "disable"):
            is_on = plugins[name] not in (False, None, "disable")
            if is_on != (asked == "enable"):
                changed.append({"name": name, "asked": asked, "built": "enable" if is_on else "disable"})
    return changed
