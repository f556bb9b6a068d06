"""vLLM: a decoder that opens the checkpoint itself and batches in a process of its own, beside a tower of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cxr_triton.engines.interface import ADAPTER, SLOTS, Compiled, Engine, GpuEngine, Need, Serving
from cxr_triton.engines.vllm.layout import FILES, FOLDER, NAME, engine_type
from cxr_triton.engines.vllm.version import check_container
from cxr_triton.errors import DeviceUnavailable, InvalidBundle, InvalidRecipe


class VLLM(Engine):
    """Runs the decoder alone, on a CPU or a GPU, from the checkpoint that its bundle holds."""

    name = NAME
    extra = "local"  # vLLM itself lives in another Python
    graphs = ("decoder",)
    form = "checkpoint"
    folder = FOLDER
    takes_adapter = True
    computes = ("fp32", "fp16", "bf16")
    abilities = frozenset({"prefix_reuse"})

    def options(self) -> dict[str, str]:
        from cxr_triton.engines.vllm.options import MEANINGS, OPTIONS

        return {name: f"{MEANINGS[name]}: {', '.join(values) or 'a number'}" for name, values in OPTIONS.items()}

    def files(self, graph: str) -> tuple[str, ...]:
        return tuple(f"{FOLDER}/{name}" for name in FILES)

    def exchanges(self, vision_precision: str, compute: str) -> bool:
        """Image embeddings go to it in fp32 from any tower."""
        return True

    def check_decoder(self, recipe) -> None:
        decoder = recipe.decoder
        check_container(recipe.tag)
        if decoder.precision not in (*self.computes, "fp8", "int4-awq") or decoder.head != "compute":
            raise InvalidRecipe(
                f"decoder.precision: {decoder.precision} with head {decoder.head} on {self.name}, which takes a "
                f"checkpoint as it is; choose {', '.join(self.computes)}, fp8 or int4-awq, and head compute"
            )
        if decoder.precision == "fp8" and not recipe.gpu:
            raise InvalidRecipe("decoder.precision: fp8 without a gpu; vLLM for CPUs has no kernel for it: choose bf16")
        own = engine_type(decoder.precision, decoder.compute)
        if decoder.kv not in (own, "fp8"):
            raise InvalidRecipe(f"decoder.kv: {decoder.kv} beside a decoder in {own}; choose {own} or fp8")
        if recipe.kv_tokens < recipe.max_sequence:
            raise InvalidRecipe(
                f"decoder.kv_share: {decoder.kv_share:g} leaves {recipe.kv_tokens} tokens, one sequence may take "
                f"{recipe.max_sequence}; raise it to {1 / recipe.slots:.3g} at least"
            )

    def check_target(self, recipe, graph: str) -> None:
        """A GPU has to have tensor cores for what it computes."""
        if recipe.gpu or recipe.compute_capability:
            GpuEngine.check_target(_OnGpu(), recipe, graph)

    def stored(self, layer: str, precision: str) -> str:
        """See `cxr_triton.export.pack_quantized`."""
        return "bf16" if (layer, precision) == ("o_proj", "int4-awq") else precision

    def prepare(self, job) -> Callable[[Path], Compiled]:
        from cxr_triton.export.folder import FOLDER as SOURCE

        folder = job.source / SOURCE
        for name in FILES:
            if not (folder / name).is_file():
                raise InvalidBundle(f"{name} is missing in {folder}; export again")
        if not list(folder.glob("*.safetensors")):
            raise InvalidBundle(f"{folder} holds no weights; export again")
        return super().prepare(job)

    def compile(self, job, folder: Path) -> Compiled:
        from cxr_triton.export.folder import FOLDER as SOURCE
        from cxr_triton.export.folder import take

        take(job.source / SOURCE, folder / FOLDER)
        if (job.source / ADAPTER).is_dir():
            take(job.source / ADAPTER, folder / ADAPTER)
        return Compiled({})

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        raise DeviceUnavailable(f"{self.name} schedules by itself and has no session; package the bundle and serve it")

    def needs(self, bundle, graph: str) -> Iterator[Need]:
        """A Python that has vLLM, in a version that is known here."""
        from cxr_triton.engines.vllm.layout import interpreter
        from cxr_triton.engines.vllm.version import FIRST, LAST, check_installed, installed

        what, wanted = "Python with vLLM", f"one that has vLLM {FIRST} to {LAST}"
        try:
            python = interpreter()
            version = check_installed(python, installed(python))
            yield Need(what=what, found=f"{python} with {version}", wanted=wanted, is_met=True)
        except DeviceUnavailable as error:
            found, _, how = error.message.partition("; ")
            yield Need(what=what, found=found, wanted=wanted, is_met=False, remedy=how)

    def try_decoder(self, bundle, *, slots: int) -> None:
        """There has to be a Python with a known vLLM; whether it takes the bundle is known when it is opened."""
        from cxr_triton.engines.vllm.layout import interpreter
        from cxr_triton.engines.vllm.version import check_installed, installed

        python = interpreter()
        check_installed(python, installed(python))
        if not bundle.is_on_cpu and not Path("/dev/nvidiactl").exists():
            raise DeviceUnavailable("the bundle is for an NVIDIA GPU, and there is none here")

    def open_judged(self, bundle, *, slots: int, threads: int | None = None):
        from cxr_triton.engines.vllm.judged import JudgedVLLM

        return JudgedVLLM(bundle, slots, threads)

    def open_runtime(self, bundle, parameters: Mapping[str, str], address: str):
        from cxr_triton.chat import ChatTokenizer
        from cxr_triton.engines.vllm.options import OPTIONS, adapter, arguments
        from cxr_triton.engines.vllm.process import EngineProcess
        from cxr_triton.engines.vllm.runtime import VLLMRuntime, end_soon

        slots = int(parameters["slots"])
        options = {name: parameters[name] for name in OPTIONS if name in parameters}
        tokenizer = ChatTokenizer(bundle.path)
        process = EngineProcess(
            arguments(bundle, slots, options),
            threads=int(parameters["threads"]) or None,
            adapter=adapter(bundle),
            on_death=end_soon,
        )
        queue_size = int(parameters["queue_size"])
        return VLLMRuntime(bundle.geometry, process, tokenizer, slots=slots, queue_size=queue_size)

    def serving(self, bundle, settings) -> Serving:
        from cxr_triton.engines.vllm.options import checked

        recipe = bundle.manifest.get("recipe") or {}
        slots = settings.slots or recipe.get("slots") or SLOTS
        options = checked(settings.options)
        if settings.prefix_reuse is False or not settings.prefix_cache_mib:
            options["prefix-caching"] = "off"
        if settings.drafts is False:
            options["drafts"] = "off"
            options.pop("draft-tokens", None)
        return Serving(parameters={"slots": slots, "threads": settings.threads, **options})

    def run_bytes(self, bundle, graph: str) -> int:
        """All weights of the decoder but the table that tokens are looked up in, where it is not the head too.

        Those of an adapter, some hundredths of them, are left out.
        """
        from cxr_triton.export.folder import decoder_bytes
        from cxr_triton.export.geometry import is_tied

        folder = bundle.path / FOLDER
        return decoder_bytes(folder, tied=is_tied(json.loads((folder / "config.json").read_text("utf-8"))))


class _OnGpu(GpuEngine):
    name = NAME


ENGINE = VLLM()
