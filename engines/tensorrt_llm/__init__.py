"""TensorRT-LLM: a decoder that `trtllm-build` builds and NVIDIA's C++ backend of Triton batches in flight."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cxr_triton.engines.interface import Compiled, GpuEngine, Need, Serving, plan_bytes
from cxr_triton.engines.tensorrt import TensorRT
from cxr_triton.engines.tensorrt_llm.layout import (
    CONTAINERS,
    DRIVER,
    DRIVER_VERSION,
    FILES,
    FOLDER,
    NAME,
    TRITON,
    step_tokens,
)
from cxr_triton.errors import DeviceUnavailable, InvalidRecipe


class TensorRTLLM(GpuEngine):
    """Runs the decoder alone, in NVIDIA's container; its tower is a TensorRT plan in Triton's own backend."""

    name = NAME
    graphs = ("decoder",)
    form = "tensorrt-llm"
    folder = FOLDER
    in_container = True
    backends = ("tensorrtllm", "tensorrt")
    home = "NVIDIA's container with TensorRT-LLM, see deploy/README.md"

    def files(self, graph: str) -> tuple[str, ...]:
        return tuple(f"{FOLDER}/{name}" for name in FILES)

    def check_cache(self, recipe) -> None:
        """Its cache is paged; what else is of its own in a recipe is checked here too, before that."""
        decoder = recipe.decoder
        if recipe.vision.compiler != TensorRT.name:
            raise InvalidRecipe(
                f"vision.compiler: {recipe.vision.compiler} beside a tensorrt-llm decoder; its container runs tensorrt"
            )
        if recipe.tag not in CONTAINERS:
            raise InvalidRecipe(
                f"container: {recipe.container} is not known to have trtllm-build of TensorRT-LLM 1.2; use "
                f"nvcr.io/nvidia/tritonserver:{max(CONTAINERS)}"
            )
        if decoder.compute != "bf16" or decoder.head != "compute":
            raise InvalidRecipe(
                f"decoder: compute {decoder.compute} with head {decoder.head}; the checkpoint for tensorrt-llm has "
                "compute bf16 and head compute"
            )
        if decoder.precision not in ("bf16", "fp8", "int4-awq"):
            raise InvalidRecipe(
                f"decoder.precision: {decoder.precision} would be rounded by trtllm-build, unlike what the gate "
                "measures; choose bf16, fp8 or int4-awq"
            )
        if decoder.kv != "bf16" and (decoder.kv, decoder.precision) != ("fp8", "fp8"):
            raise InvalidRecipe(
                f"decoder.kv: {decoder.kv} with {decoder.precision} weights; tensorrt-llm gets a cache in bf16, or in "
                "fp8 with fp8 weights"
            )
        if recipe.kv_tokens < recipe.max_sequence:
            raise InvalidRecipe(
                f"decoder.kv_share: {decoder.kv_share:g} leaves {recipe.kv_tokens} tokens, one sequence may take "
                f"{recipe.max_sequence}; raise it to {1 / recipe.slots:.3g} at least"
            )

    def step_tokens(self, recipe) -> int:
        return step_tokens(recipe.slots, recipe.max_sequence)

    def stream_bytes(self, recipe, text) -> int:
        """Image rows, and cos and sin of every position."""
        from cxr_triton.profile import load_profile, profile_names

        profiles = [load_profile(name) for name in profile_names()]
        rows = max(profile.max_images * profile.token_budget for profile in profiles)
        return rows * text.hidden_size * 2 + recipe.max_sequence * text.head_dim * 4

    def check_machine(self, recipe) -> None:
        from cxr_triton.engines.tensorrt_llm.build import check_machine

        check_machine(recipe)

    def prepare(self, job) -> Callable[[Path], Compiled]:
        from cxr_triton.engines.tensorrt_llm.build import DecoderBuild

        return DecoderBuild.prepare(job).run

    def needs(self, bundle, graph: str) -> Iterator[Need]:
        """Its container, and on the host a driver for that container's CUDA."""
        image = (bundle.manifest.get("recipe") or {}).get("container")
        is_there = all((TRITON / "backends" / name).is_dir() for name in self.backends)
        yield Need(
            what="Triton with this engine's backends",
            found=str(TRITON) if is_there else "not on this machine",
            wanted=f"container {image}",
            is_met=is_there or None,  # a host starts the container, and has no backend itself
            remedy=f"serve in {self.home}",
        )
        said = re.search(r"Kernel Module\D+([\d.]+)", _read(DRIVER_VERSION))
        is_met = said is not None and _numbers(said[1]) >= _numbers(DRIVER)
        yield Need(
            what="NVIDIA driver", found=said[1] if said else "none is loaded", wanted=f"{DRIVER} or later",
            is_met=is_met, remedy=f"install driver {DRIVER} or later on the host",
        )  # fmt: skip

    def commands(self, job, named: str) -> dict[str, tuple[str, list | str]]:
        from cxr_triton.engines.tensorrt_llm.build import commands

        return commands(job, named)

    def open_decoder(self, bundle, *, slots: int, threads: int | None = None, batch_invariant: bool = False):
        raise DeviceUnavailable(
            "an engine of tensorrt-llm runs in Triton's tensorrtllm backend only; package the bundle and serve it in "
            "its container"
        )

    def open_runtime(self, bundle, parameters: Mapping[str, str], address: str):
        from cxr_triton.chat import ChatTokenizer
        from cxr_triton.engines.tensorrt_llm.backend import TensorRTLLMBackend
        from cxr_triton.engines.tensorrt_llm.request import EngineConfig
        from cxr_triton.engines.tensorrt_llm.runtime import TensorRTLLMRuntime

        return TensorRTLLMRuntime(
            EngineConfig.read(bundle.path / FOLDER),
            TensorRTLLMBackend(address),
            ChatTokenizer(bundle.path),
            slots=int(parameters["slots"]),
            queue_size=int(parameters["queue_size"]),
            prefix_reuse=parameters["prefix_reuse"] == "1",
        )

    def serving(self, bundle, settings) -> Serving:
        from cxr_triton.engines.tensorrt_llm.serving import serving

        return serving(bundle, settings)

    def run_bytes(self, bundle, graph: str) -> int:
        return plan_bytes(bundle, graph)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


ENGINE = TensorRTLLM()
