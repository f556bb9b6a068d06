"""Compile a graph to a plan, with TensorRT or a library that has its Python interface, as the room says."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton import __version__
from cxr_triton.engines import DEFAULT
from cxr_triton.engines.digest import sha256
from cxr_triton.engines.interface import PREFILL_PROMPTS, PREFILL_TOKENS
from cxr_triton.engines.plan_cache import built
from cxr_triton.engines.tensorrt.library import Library, Target, logger, released
from cxr_triton.errors import BuildFailed, DeviceUnavailable
from cxr_triton.profile import load_profile

if TYPE_CHECKING:
    from onnx import ModelProto

    from cxr_triton.engines.build import Job
    from cxr_triton.engines.geometry import Geometry
    from cxr_triton.engines.recipe import Recipe

CONTAINER_TENSORRT = {
    **dict.fromkeys((f"26.0{month}-trtllm-python-py3" for month in (3, 4, 5, 6, 7)), "10.14.1.48"),
    **dict.fromkeys(("25.11-trtllm-python-py3", "25.12-trtllm-python-py3"), "10.13.3.9"),
    **dict.fromkeys(("26.01-trtllm-python-py3", "26.02-trtllm-python-py3"), "10.13.3.9"),
}
"""TensorRT of Triton's containers, from docs/introduction/compatibility.md of triton-inference-server/server (0f963c9).

That table covers the trtllm containers only; the plain ones are in NVIDIA's frameworks support matrix.
"""

Ranges = dict[str, list[tuple[int, ...]]]
"""Least, usual and largest shape of each input."""

_NODE = re.compile(r"node[: ]+\{?([\w.:/\[\]+ -]+?)[\]}]*(?:\.| due|,|:|$)")
_OPERATOR = re.compile(r"(\w+) operation was not supported")
_INITIALIZER = re.compile(r"Failed to import initializer: ([\w.]+)$")
_OTHER = f"use a newer version of the compiler, or engine {DEFAULT}"
_REMEDIES = (
    ("initializer", "the graph and its .data file are not of one export; export again"),
    ("softmax precision", "export again with this version of cxr-triton"),
    ("plugin not found", "the compiler has no such operator; export again with this version of cxr-triton"),
    ("dedicated kernel", "attention has fused kernels in fp16 and bf16 only: export with --compute fp16 or bf16"),
    ("implementation", "export with --compute fp16 or bf16, or choose another precision"),
    ("opset", "use a newer version of the compiler"),
    ("unsupported", _OTHER),
    ("not supported", _OTHER),
    ("memory", "free memory, or lower slots, max_sequence or image_budget of the recipe"),
)


def container_match(container: str | None, version: str) -> dict:
    """Whether a plan of TensorRT `version` runs in Triton's `tensorrt_plan` backend of a container.

    That backend, unlike the package that the Python sessions load, has the TensorRT of its container, and a plan loads
    only in the version that wrote it.

    Returns
    -------
    dict
        ``container``, ``tensorrt`` (None if the table does not know it), ``matches`` (None if not known) and ``said``.
    """
    tag = (container or "").rpartition(":")[2]
    known, version = CONTAINER_TENSORRT.get(tag), released(version)
    if known is None:
        said = (
            f"TensorRT of {container or 'the container'} is not known here: for tensorrt_plan it has to be {version}; "
            "compare `dpkg -l libnvinfer-bin` there. The served sessions use their own TensorRT package"
        )
    elif known == version:
        said = f"{container} has TensorRT {known}, as the plan"
    else:
        said = (
            f"{container} has TensorRT {known}, the plan is of {version}: its tensorrt_plan backend refuses it. "
            "The served sessions use their own TensorRT package"
        )
    return {
        "container": container,
        "tensorrt": known,
        "matches": None if known is None else known == version,
        "said": said,
    }


def shape_ranges(graph: str, geometry: Geometry, recipe: Recipe, max_images: int) -> list[Ranges]:
    """Optimization profiles of a graph: one for vision; prefill, then decode, for the decoder.

    No dimension of prefill is 1 where decode's is not: TensorRT would lay weights out for each of them and keep both.

    Parameters
    ----------
    graph : {"vision", "decoder"}
    geometry : Geometry
    recipe : Recipe
    max_images : int
        Images of one request, from the model's profile.
    """
    if graph == "vision":
        windows, tokens, images = geometry.window_budget, geometry.token_budget, recipe.image_budget
        values = {"pixel_windows": (64, 588), "patch_rows_cols": (64, 2), "valid": (64,)}
        batches = ((1, 1), (max(1, images // 2), windows), (images, windows))
        ranges = {name: [(b, w, *rest) for b, w in batches] for name, rest in values.items()}
        return [ranges | {"merge_order": [(b, tokens) for b, _ in batches]}]
    cache = (geometry.kv_heads, geometry.max_sequence, geometry.head_dim)
    caches = [f"past_{part}.{layer}" for layer in range(geometry.layers) for part in ("key", "value")]
    new = min(PREFILL_TOKENS, geometry.max_sequence)
    rows = geometry.token_budget
    result: list[Ranges] = []
    for cases in (
        ((1, 1, 1), (1, min(256, new), rows), (PREFILL_PROMPTS, new, max_images * rows)),  # sequences, tokens, rows
        ((1, 1, 1), (recipe.slots, 1, 1), (max(2, recipe.slots), 1, 1)),
    ):
        shapes: dict[str, Callable[[int, int, int], tuple[int, ...]]] = {
            "input_ids": lambda b, s, n: (b, s),
            "image_index": lambda b, s, n: (b, s),
            "image_embeddings": lambda b, s, n: (n, geometry.hidden),
            "position_ids": lambda b, s, n: (3, b, s),
            "write_index": lambda b, s, n: (b,),
            "logits_index": lambda b, s, n: (b, 1),
            **dict.fromkeys(caches, lambda b, s, n: (b, *cache)),
        }
        result.append({name: [shape(*case) for case in cases] for name, shape in shapes.items()})
    return result


def adapt(model: ModelProto, max_sequence: int) -> ModelProto:
    """Fix the length of the cache, and drop what the parser refuses.

    It takes no `softmax_precision`: the type in which a fused kernel normalizes is TensorRT's choice, and the gate
    judges what comes out.
    """
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "max_seq":
                dimension.dim_value = max_sequence
    for node in model.graph.node:
        if node.op_type == "Attention":
            kept = [attribute for attribute in node.attribute if attribute.name != "softmax_precision"]
            del node.attribute[:]
            node.attribute.extend(kept)
    return model


def build_plan(library: Library, job: Job, plan: Path) -> dict:
    """Put a graph's plan to `plan`, from the job's cache if it is there; report and errors as `compile_graph`."""
    version, target = library.load(job.graph).__version__, library.target(job.recipe)
    source, sequence = job.source / f"{job.graph}.onnx", job.geometry.max_sequence
    images = load_profile(job.source / "profile.yaml").max_images
    ranges = shape_ranges(job.graph, job.geometry, job.recipe, images)

    def inputs() -> dict:
        return {
            "graphs": [sha256(path, job.progress) for path in (source, source.with_name(f"{source.name}.data"))],
            "shapes": ranges,
            "max_sequence": sequence,
            "engine": library.name,
            "version": version,
            "cxr_triton": __version__,
            **dataclasses.asdict(target),
        }

    def build() -> dict:
        name = f"timing-{library.name}-{version}-{target.compute_capability}.cache"
        times = job.cache / name if job.cache and library.keeps_times else None
        return compile_graph(
            library, source, plan, profiles=ranges, max_sequence=sequence, target=target, timing_cache=times
        )

    return built(job.cache, plan, inputs, build)


def compile_graph(
    library: Library,
    graph: Path,
    plan: Path,
    *,
    profiles: list[Ranges],
    max_sequence: int,
    target: Target,
    timing_cache: Path | None = None,
    progress: bool | None = None,
) -> dict:
    """Compile an ONNX file to a plan.

    Parameters
    ----------
    library : Library
    graph : Path
        Its `.data` file lies beside it.
    plan : Path
        Written as it is built, so that it is never in memory as a whole; incomplete if this raises.
    profiles : list of Ranges
    max_sequence : int
        Length of the KV cache.
    target : Target
    timing_cache : Path, optional
        Kernel times of TensorRT, read if present and of this GPU, and written back.
    progress : bool, optional
        Show a bar on standard error; by default on a terminal.

    Returns
    -------
    dict
        ``engine``, ``version``, ``compute_capability``, ``gpu``, ``seconds``, ``bytes`` of the plan, ``weights_bytes``
        of the graph's initializers, ``cache_bytes`` of the largest KV cache that it takes, ``reported`` (what the
        compiler says: ``weights_bytes``, and ``activation_bytes`` of each profile), ``layers`` (kinds of the parsed
        network and their counts).

    Raises
    ------
    DeviceUnavailable
        The library or its GPU is missing.
    BuildFailed
        The parser or the builder refuses the graph: names node, operator and remedy.
    """
    import onnx

    trt = library.load(graph.stem)
    what, started_s = f"{library.name} {trt.__version__}", time.monotonic()
    log = logger(trt, what)
    builder = _builder(trt, log)
    model = adapt(onnx.load(graph, load_external_data=False), max_sequence)
    network = _parsed(trt, builder, log, model, graph)
    config = builder.create_builder_config()
    for ranges in profiles:
        _add_profile(what, builder, config, network, ranges)
    library.configure(trt, config, target)
    times = None if timing_cache is None else _attach_times(config, timing_cache)
    done = _written(trt, builder, network, config, plan, progress=progress)
    if not done or not plan.stat().st_size:
        raise _builder_error(what, graph.name, log.errors, model)
    if timing_cache is not None and times is not None:
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        timing_cache.write_bytes(times.serialize())
    return {
        "engine": library.name,
        "version": trt.__version__,
        **dataclasses.asdict(target),
        "seconds": round(time.monotonic() - started_s, 1),
        "bytes": plan.stat().st_size,
        "weights_bytes": weights_bytes(model),
        "cache_bytes": _cache_bytes(network, profiles[-1]),
        "reported": log.reported | {"weights_bytes": next(iter(log.reported["weights_bytes"]), None)},
        "layers": dict(sorted(Counter(network.get_layer(i).type.name for i in range(network.num_layers)).items())),
    }


def _written(trt, builder, network, config, plan: Path, *, progress: bool | None) -> bool:
    """Whether the builder says that it wrote a plan; Ctrl-C ends it."""
    with open(plan, "wb") as file, _monitor(trt, plan.name, progress) as monitor:
        config.progress_monitor = monitor
        done = builder.build_serialized_network_to_stream(network, config, _writer(trt, file))
    if monitor.interrupted:
        raise KeyboardInterrupt
    return bool(done)


def _builder(trt, log):
    try:
        return trt.Builder(log)
    except (TypeError, RuntimeError):
        raise DeviceUnavailable(
            f"{log.what} finds no GPU to build on ({log.last or 'no message'}); build on a machine with the recipe's "
            "GPU and driver"
        ) from None


def _parsed(trt, builder, log, model: ModelProto, graph: Path):
    """The network of a model, whose weights lie beside the file `graph`."""
    # Types are those of the graph: nothing is cast behind its back. From TensorRT 11 on there is no other way.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), str(graph)):
        raise _parser_error(log.what, graph.name, parser)
    return network


def weights_bytes(model: ModelProto) -> int:
    """Bytes of a graph's initializers, in and beside the file."""
    total = 0
    for tensor in model.graph.initializer:
        lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
        total += lengths[0] if lengths else len(tensor.raw_data)
    return total


def _attach_times(config, path: Path):
    """Kernel times of earlier builds; where the builder refuses them (damaged, of another card) an empty cache."""
    for known in (path.read_bytes() if path.is_file() else b"", b""):
        times = config.create_timing_cache(known)
        if times is not None and config.set_timing_cache(times, ignore_mismatch=False):
            return times
    return None


def _cache_bytes(network, ranges: Ranges) -> int:
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    caches = [tensor for tensor in tensors if tensor.name.startswith("past_")]
    return sum(math.prod(ranges[tensor.name][2]) * tensor.dtype.itemsize for tensor in caches)


def _add_profile(what: str, builder, config, network, ranges: Ranges) -> None:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shapes = ranges.get(tensor.name)
        if shapes is None or any(
            len(shape) != len(tensor.shape) or any(d not in (-1, s) for d, s in zip(tensor.shape, shape, strict=True))
            for shape in shapes
        ):
            raise BuildFailed(
                f"{what}: input {tensor.name} has shape {list(tensor.shape)}, the recipe's shapes are "
                f"{shapes}; graph and geometry are not of one export: export again"
            )
        profile.set_shape(tensor.name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise BuildFailed(f"{what} refuses the optimization profile {ranges}; change the recipe's shapes")


def _remedy(text: str) -> str:
    found = next((remedy for words, remedy in _REMEDIES if words in text.lower()), None)
    return found or f"use another version of the compiler or engine {DEFAULT}, and report the node"


def _parser_error(what: str, graph: str, parser) -> BuildFailed:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if not errors:
        return BuildFailed(f"{what} cannot parse {graph} and does not say why; export again")
    first = errors[0]
    text = " ".join(first.desc().split())
    if found := _INITIALIZER.search(text):
        return BuildFailed(f"{what} cannot read the weights {found[1]} of {graph}; {_remedy(text)}")
    same = sum(error.node_operator() == first.node_operator() for error in errors) - 1
    others = f" ({same} more of this operator)" if same else ""
    return BuildFailed(
        f"{what} refuses node {first.node_name() or first.node()} ({first.node_operator() or 'no operator'}) of "
        f"{graph}{others}: {text}; {_remedy(text)}"
    )


def _builder_error(what: str, graph: str, messages: list[str], model: ModelProto) -> BuildFailed:
    """The first message that names a node or an operator, else the first one; the rest follows from it."""
    operators = {node.name: node.op_type for node in model.graph.node}
    message, where = (messages or ["no message"])[0], "the graph"
    for text in messages:
        if found := _NODE.search(text):
            message, where = text, f"node {found[1]} ({operators.get(found[1], 'several nodes fused')})"
            break
        if found := _OPERATOR.search(text):
            nodes = [name for name, operator in operators.items() if operator == found[1]]
            first = f"node {nodes[0]} " if nodes else ""
            more = f" and {len(nodes) - 1} more of this operator" if len(nodes) > 1 else ""
            message, where = text, f"{first}({found[1]}){more}"
            break
    return BuildFailed(f"{what} cannot build {where} of {graph}: {' '.join(message.split())[:400]}; {_remedy(message)}")


# What follows derives from classes of a library that is imported on use, which a type checker cannot see.


def _writer(trt, file):
    class Writer(trt.IStreamWriter):  # type: ignore[name-defined]
        def __init__(self):
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return Writer()


def _monitor(trt, name: str, progress: bool | None):
    from tqdm import tqdm

    class Monitor(trt.IProgressMonitor):
        """Steps of all phases as one bar; Ctrl-C stops the build at the next step."""

        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._left: dict[str, int] = {}

        def __enter__(self):
            self._bar = tqdm(total=0, desc=name, unit="step", disable=None if progress is None else not progress)
            return self

        def __exit__(self, *exception):
            self._bar.close()

        def phase_start(self, phase, parent, steps):
            self._left[phase] = steps
            self._bar.total += steps
            self._bar.set_postfix_str(phase, refresh=False)

        def step_complete(self, phase, step):
            self._left[phase] -= 1
            self._move(1)
            return not self.interrupted

        def phase_finish(self, phase):
            self._move(max(0, self._left.pop(phase, 0)))

        def _move(self, steps):
            try:
                self._bar.update(steps)
            except KeyboardInterrupt:  # must not pass through the library, whose caller this is
                self.interrupted = True

    return Monitor()
