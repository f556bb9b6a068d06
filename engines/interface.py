"""What an engine says of itself: `Engine`, and the two kinds that most are.

A room overrides what is different with it. Bundles, recipes and jobs are handed to it unannotated here, as their
modules ask the table of engines, which imports this one; rooms may annotate them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cxr_triton.errors import DeviceUnavailable, InvalidBundle, InvalidRecipe, InvalidRequest
from cxr_triton.extras import remedy

if TYPE_CHECKING:
    from cxr_triton.engines.runtime.judged import JudgedDecoder
    from cxr_triton.engines.runtime.scheduler import Runtime
    from cxr_triton.engines.session import DecoderSession, VisionSession

ABILITIES = {
    "batch_invariant": "batch-invariant readings were",
    "prefix_reuse": "prefix reuse was",
    "drafts": "drafts were",
}
"""What only some engines do, as a message begins that says so; settings of a repository have the same names."""
ADAPTER = "adapter"
"""Folder of a bundle, with the two files of a LoRA adapter as peft writes them."""
COMPUTES = ("fp32", "fp16", "bf16")
SLOTS = 4
PREFILL_PROMPTS, PREFILL_TOKENS = 2, 512
"""Most prompts, and tokens of each, in one run of a compiled graph; sessions cut longer prompts into pieces."""
_NEEDS_CAPABILITY = {"fp8": (8, 9), "bf16": (8, 0)}  # tensor cores have the type from here on


@dataclass(frozen=True)
class Compiled:
    """What compiling one graph adds to the manifest of its bundle.

    Attributes
    ----------
    versions : dict
        Of the compiler and what it stands on, by name.
    plan : dict, optional
        Build report of what runs on one kind of GPU only: ``engine``, ``version``, ``compute_capability``, ``gpu``,
        ``seconds``, ``bytes``, ``weights_bytes`` and more of the engine's own.
    container : dict, optional
        Whether the recipe's container runs it: ``container``, ``matches``, ``said`` and more.
    """

    versions: dict[str, str]
    plan: dict | None = None
    container: dict | None = None


@dataclass(frozen=True, kw_only=True)
class Need:
    """Something that a bundle needs of the machine that serves it, and what is here.

    Attributes
    ----------
    what, found, wanted : str
    is_met : bool or None
        None where it cannot be told here.
    remedy : str
        What to do where it is not met.
    """

    what: str
    found: str
    wanted: str
    is_met: bool | None
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a decoder's engine is served.

    Attributes
    ----------
    parameters : dict
        Of the served model `decoder`, for `Engine.open_runtime`.
    models : tuple of ModelConfig
        Served beside the four.
    vision : ModelConfig, optional
        In the place of the vision encoder in Python. Its tensors stand in the order of `serving.STEPS`.
    embeddings : str
        Type of the image embeddings between the two.
    files : dict
        Path in the repository to the file of the bundle that lies there.
    """

    parameters: dict[str, object]
    models: tuple = ()
    vision: Any = None
    embeddings: str = "TYPE_FP32"
    files: dict[str, str] = field(default_factory=dict)


class Engine:
    """One engine. What it does not override it does not do, or does as most do.

    Attributes
    ----------
    name : str
        As recipes and manifests write it.
    extra : str
        Of the distribution, which brings its packages.
    distributions : tuple of str
        Those packages, by whose versions a measurement is to be understood.
    graphs : tuple of str
        What it runs: ``vision``, ``decoder``.
    form : str
        Of the decoder in an export, see `cxr-triton export --format`.
    suffixes : tuple of str
        Of the files of a graph in a bundle.
    folder : str or None
        Of a bundle, for the decoder's files alone.
    takes_adapter : bool
        It runs the decoder with the LoRA adapter that a bundle holds.
    computes : tuple of str
        Types that it computes in.
    needs_recipe : bool
        It compiles for one target.
    in_container : bool
        Its bundles are built in the recipe's container, on the recipe's GPU.
    copies, head_copies : int
        How often it holds the weights of the decoder's layers, and of its head.
    precisions : tuple of str
        Of the decoder's weights, where it runs these alone.
    splits_attention : bool
        The decoder's attention is products of matrices: it holds their scores, and of a prompt a copy of the cache.
    abilities : frozenset of str
        Keys of `ABILITIES`.
    reuses_prefixes : bool
        It does so unless told otherwise, given the ability.
    products : tuple of str
        Precisions in which it multiplies on a CPU, where that is the ceiling of what it can do.
    cpu_features : tuple of str
        Features of a CPU, as Linux names them, for which it has kernels of its own.
    backends : tuple of str
        Triton's backends that a repository needs and the pip-installed server has not; `home` says who has them.
    """

    name: ClassVar[str]
    extra: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]] = ()
    graphs: ClassVar[tuple[str, ...]] = ("vision", "decoder")
    form: ClassVar[str] = "onnx"
    suffixes: ClassVar[tuple[str, ...]] = ("onnx", "onnx.data")
    folder: ClassVar[str | None] = None
    takes_adapter: ClassVar[bool] = False
    computes: ClassVar[tuple[str, ...]] = ()
    needs_recipe: ClassVar[bool] = True
    in_container: ClassVar[bool] = False
    copies: ClassVar[int] = 1
    head_copies: ClassVar[int] = 1
    precisions: ClassVar[tuple[str, ...]] = ()
    splits_attention: ClassVar[bool] = False
    abilities: ClassVar[frozenset[str]] = frozenset()
    reuses_prefixes: ClassVar[bool] = False
    products: ClassVar[tuple[str, ...]] = ()
    cpu_features: ClassVar[tuple[str, ...]] = ()
    backends: ClassVar[tuple[str, ...]] = ()
    home: ClassVar[str] = ""

    @property
    def is_installed(self) -> bool:
        """Its packages are here."""
        try:
            return all(metadata.version(name) for name in self.distributions)
        except metadata.PackageNotFoundError:
            return False

    def options(self) -> dict[str, str]:
        """What only it can be asked for when it is served, by name: what it means, with its values."""
        return {}

    def files(self, graph: str) -> tuple[str, ...]:
        """Names of the files in a bundle that hold a graph; more may lie in `folder`."""
        return tuple(f"{graph}.{suffix}" for suffix in self.suffixes)

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders that a bundle may have: for the decoder's files, and for an adapter's."""
        return tuple(filter(None, (self.folder, ADAPTER if self.takes_adapter else None)))

    # Recipes.

    def types(self, graph: str) -> tuple[str, ...]:
        """Types that a graph may compute in."""
        return self.computes

    def exchanges(self, vision_precision: str, compute: str) -> bool:
        """Whether image embeddings of a tower in one type go into a decoder that computes in another."""
        return vision_precision == compute

    def check_decoder(self, recipe) -> None:
        """Refuse a recipe with a decoder that this engine does not run; raises `InvalidRecipe`."""
        decoder = recipe.decoder
        self.check_cache(recipe)
        if decoder.precision in COMPUTES and (decoder.precision != decoder.compute or decoder.head != "compute"):
            raise InvalidRecipe(
                f"decoder: {decoder.precision} weights compute in {decoder.compute} with head {decoder.head}; plain "
                f"weights have compute {decoder.precision} and head compute"
            )
        if self.precisions and decoder.precision not in self.precisions:
            raise InvalidRecipe(
                f"decoder.precision: {decoder.precision} on {self.name}; choose {' or '.join(self.precisions)}"
            )

    def check_cache(self, recipe) -> None:
        """Refuse a recipe with a KV cache that this engine does not have; raises `InvalidRecipe`."""
        decoder = recipe.decoder
        if decoder.kv_share != 1:
            raise InvalidRecipe(
                f"decoder.kv_share: {decoder.kv_share:g} is given, but {self.name} has no paged KV cache; leave it out"
            )
        if decoder.kv != decoder.compute:
            raise InvalidRecipe(
                f"decoder.kv: {decoder.kv} is not decoder.compute {decoder.compute}; the KV cache of {self.name} has "
                "the compute type: make them equal"
            )

    def check_target(self, recipe, graph: str) -> None:
        """Refuse a recipe for a machine that this engine does not run a graph on; raises `InvalidRecipe`."""
        key, kind = "decoder.compute", recipe.decoder.compute
        if graph == "vision":
            key, kind = "vision.precision", recipe.vision.precision
        if kind not in self.types(graph):
            raise InvalidRecipe(
                f"{key}: {kind} on {self.name}; engines on a CPU compute in fp32, attention on a GPU has fused kernels "
                "in fp16 and bf16 only"
            )

    def step_tokens(self, recipe) -> int:
        """Most tokens in one run of the decoder."""
        return max(PREFILL_PROMPTS * PREFILL_TOKENS, recipe.slots)

    def stream_bytes(self, recipe, text) -> int:
        """What each stream keeps beside its KV cache; `text` is the decoder's part of a checkpoint's config."""
        return 0

    def stored(self, layer: str, precision: str) -> str:
        """Precision that a linear layer, such as ``o_proj``, is stored in where the decoder's is `precision`."""
        return precision

    # Building.

    def check_machine(self, recipe) -> None:
        """Refuse at once a machine that cannot build for a recipe; raises `DeviceUnavailable`."""

    def prepare(self, job) -> Callable[[Path], Compiled]:
        """Check what can be checked before the first minute; gives what then compiles into a bundle's folder.

        Parameters
        ----------
        job : cxr_triton.engines.build.Job

        Raises
        ------
        InvalidBundle, InvalidRequest
            The export is damaged, or not what the recipe builds.
        DeviceUnavailable
            A tool or the GPU is missing, or of another version or kind.
        """
        return lambda folder: self.compile(job, folder)

    def compile(self, job, folder: Path) -> Compiled:
        """Write a graph's files into `folder`; those of `files` that it does not write are copied from the export.

        Raises
        ------
        DeviceUnavailable
            The compiler, or the GPU that it needs, is missing.
        BuildFailed
            The compiler refuses the graph.
        """
        raise NotImplementedError

    def commands(self, job, named: str) -> dict[str, tuple[str, list | str]]:
        """How a bundle is built by hand: key of the JSON result to what it is and the command.

        Parameters
        ----------
        job : cxr_triton.engines.build.Job
        named : str
            The recipe, as the user named it.
        """
        return {}

    def check_installed(self, versions: Mapping[str, object]) -> None:
        """Refuse a bundle, by its manifest's versions, that the installed library cannot read; raises `InvalidBundle`.

        Where nothing is checked here, a session is refused when it is opened.
        """

    def needs(self, bundle, graph: str) -> Iterator[Need]:
        """What a graph of a bundle needs of the machine that serves it; opens no session and changes nothing."""
        for name in self.distributions:
            try:
                yield Need(what=f"package {name}", found=metadata.version(name), wanted="installed", is_met=True)
            except metadata.PackageNotFoundError:
                yield Need(
                    what=f"package {name}", found="not installed", wanted="installed", is_met=False,
                    remedy=remedy(self.extra),
                )  # fmt: skip

    # Running.

    def open_vision(self, bundle, *, threads: int | None = None) -> VisionSession:
        """Session of a bundle's vision graph; see `Bundle.open_vision`."""
        raise InvalidRequest(f"{self.name} runs no vision graph; build with another compiler")

    def open_decoder(
        self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False
    ) -> DecoderSession:
        """Session of a bundle's decoder; see `Bundle.open_decoder`."""
        raise DeviceUnavailable(f"{self.name} runs in Triton only; package the bundle and serve it")

    def try_decoder(self, bundle, *, slots: int) -> None:
        """Find out whether its decoder can be run here; raises as `open_judged`."""
        bundle.open_decoder(slots=slots)

    def open_judged(self, bundle, *, slots: int, threads: int | None = None) -> JudgedDecoder:
        """A bundle's decoder for the gate; raises `InvalidBundle` and `DeviceUnavailable`."""
        from cxr_triton.engines.runtime.judged import JudgedSession

        return JudgedSession(bundle, bundle.open_decoder(slots=slots, threads=threads))

    def open_runtime(self, bundle, parameters: Mapping[str, str], address: str) -> Runtime:
        """What serves many generations of a bundle's decoder.

        Parameters
        ----------
        bundle : Bundle
        parameters : mapping
            Of the served model `decoder`: `Serving.parameters` as text, and ``queue_size``.
        address : str
            gRPC endpoint of the server that this runs in.
        """
        from cxr_triton.engines.runtime.drafts import Drafts
        from cxr_triton.engines.runtime.guide import Guides
        from cxr_triton.engines.runtime.prefix import PrefixCache
        from cxr_triton.engines.runtime.scheduler import DecoderRuntime

        is_invariant = parameters["batch_invariant"] == "1"
        session = bundle.open_decoder(
            slots=int(parameters["slots"]),
            threads=int(parameters["threads"]) or None,
            batch_invariant=is_invariant,
        )
        kept = int(parameters["prefix_cache_mib"]) << 20
        prefix = PrefixCache(kept, exact_only=is_invariant) if kept else None
        guessed = int(parameters["draft_index_mib"]) << 20
        drafts = Drafts(guessed) if guessed else None
        return DecoderRuntime(
            bundle,
            session=session,
            prefill_chunk=int(parameters.get("prefill_chunk", "0")) or None,
            prefix=prefix,
            guides=Guides(bundle),
            drafts=drafts,
            queue_size=int(parameters["queue_size"]),
        )

    def serving(self, bundle, settings) -> Serving:
        """How a bundle whose decoder it runs is served; raises `InvalidRequest` and `InvalidBundle`."""
        reuses = self.reuses_prefixes if settings.prefix_reuse is None else settings.prefix_reuse
        guesses = "drafts" in self.abilities and settings.drafts is not False and not settings.batch_invariant
        return Serving(
            parameters={
                "slots": settings.slots or SLOTS,
                "threads": settings.threads,
                "prefill_chunk": settings.prefill_chunk,
                "batch_invariant": int(settings.batch_invariant),
                "prefix_cache_mib": settings.prefix_cache_mib if reuses and "prefix_reuse" in self.abilities else 0,
                "draft_index_mib": settings.draft_index_mib if guesses else 0,
            }
        )

    # Measuring.

    def run_bytes(self, bundle, graph: str) -> int:
        """Weights that one run of a bundle's graph reads: all but the tables of which it takes a row.

        Raises
        ------
        InvalidBundle
            The manifest does not say how large they are.
        """
        from cxr_triton.engines.rewrite import step_bytes

        return step_bytes(bundle.path / f"{graph}.onnx")

    def crowd_bytes(self, bundle, streams: int) -> int:
        """Weights that a step of so many streams reads; raises as `run_bytes`."""
        return self.run_bytes(bundle, "decoder")

    def prompt_precision(self, bundle) -> str:
        """Type of the weights that a prompt is multiplied by."""
        return str(bundle.precision).removesuffix("-awq")

    def product(self, model: bytes, feeds: Mapping, precision: str, threads: int) -> Callable[[], object]:
        """A run of an ONNX model of one matrix product on the CPU, in one of `products`."""
        raise NotImplementedError


class CpuEngine(Engine):
    """Runs on the CPU, computes in fp32, and reads graphs that an older version of its library wrote."""

    computes = ("fp32",)
    abilities = frozenset({"prefix_reuse", "drafts"})
    reuses_prefixes = True

    def step_tokens(self, recipe) -> int:
        """One prompt at a time."""
        return max(PREFILL_TOKENS, recipe.slots)

    def check_target(self, recipe, graph: str) -> None:
        """Not for a GPU either."""
        super().check_target(recipe, graph)
        if recipe.gpu or recipe.compute_capability:
            raise InvalidRecipe(f"gpu: {recipe.gpu!r} is given, but {self.name} runs on the CPU; leave gpu out")

    def check_installed(self, versions: Mapping[str, object]) -> None:
        """The installed version has to be as new, but for its patch."""
        (library,) = self.distributions
        try:
            installed = metadata.version(library)
        except metadata.PackageNotFoundError:
            return  # a machine that only packages a bundle has none
        built = versions.get(self.name)
        if not isinstance(built, str) or major_minor(installed) < major_minor(built):
            raise InvalidBundle(
                f"the bundle was built with {library} {built}, {installed} is installed; "
                f"install {library} {built} or newer, or build the bundle again here"
            )


class GpuEngine(Engine):
    """Runs on an NVIDIA GPU, in the types that its tensor cores have."""

    computes = ("fp16", "bf16")
    abilities = frozenset({"prefix_reuse"})

    def check_target(self, recipe, graph: str) -> None:
        """The GPU has to be named, with tensor cores for what the decoder computes."""
        super().check_target(recipe, graph)
        capability = recipe.compute_capability
        if not recipe.gpu or not re.fullmatch(r"\d{1,2}\.\d", capability or ""):
            raise InvalidRecipe(
                f"compute_capability: {capability!r} of gpu {recipe.gpu!r}; {self.name} needs both, the capability "
                'quoted, as "8.9"'
            )
        has, decoder = tuple(int(part) for part in capability.split(".")), recipe.decoder
        for kind in {decoder.precision, decoder.head, decoder.compute} & set(_NEEDS_CAPABILITY):
            if has < (needs := _NEEDS_CAPABILITY[kind]):
                raise InvalidRecipe(
                    f"compute_capability: {capability} has no {kind} tensor cores, {needs[0]}.{needs[1]} is needed; "
                    "choose another precision"
                )


def plan_bytes(bundle, graph: str) -> int:
    """`Engine.run_bytes` of a graph that was compiled to a plan, as its build report has them."""
    try:
        return without_table(bundle, graph, int(bundle.manifest["plans"][graph]["weights_bytes"]))
    except (KeyError, TypeError, ValueError):
        raise InvalidBundle(
            f"manifest.json: plans.{graph}.weights_bytes is missing, so the bytes of a step are not known; build the "
            "bundle again"
        ) from None


def without_table(bundle, graph: str, size: int) -> int:
    """Bytes of a graph's weights less the table that tokens are looked up in, where it is not the head too."""
    if graph == "decoder" and bundle.manifest.get("head") not in (None, "compute"):
        size -= 2 * bundle.geometry.vocab * bundle.geometry.hidden  # 2 bytes a value
    return size


def major_minor(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
