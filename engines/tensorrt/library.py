"""The library that compiles and runs plans, and what another one with its Python interface does differently."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_triton.errors import DeviceUnavailable
from cxr_triton.extras import remedy

if TYPE_CHECKING:
    from cxr_triton.engines.recipe import Recipe


@dataclass(frozen=True)
class Target:
    """What engines are built for.

    Attributes
    ----------
    compute_capability : str
        As ``"8.9"``.
    gpu : str or None
        Name of the GPU that kernels are timed on; None if there is none.
    """

    compute_capability: str
    gpu: str | None


def released(version: str) -> str:
    """A version without what says how it was packed, as in ``1.2.1+cu13`` and ``10.14.1.48.post1``."""
    return re.sub(r"(\+|\.post).*", "", version)


_REPORTED = {
    "weights_bytes": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "activation_bytes": re.compile(r"Total Activation Memory: (\d+) bytes"),
}
_SOURCE = re.compile(r"^(\S+\.(cpp|h):\d+:?\s*|In function \S+\s*|I\w+::\w+: |Error Code \d+: |\[\S+::\d+\]\s*)+")


class Library:
    """TensorRT.

    Attributes
    ----------
    name, extra : str
        As the engine's.
    module : str
        Python module.
    least_version : (int, int)
        The first with the decoder's layers: `KV_CACHE_UPDATE`, `ATTENTION` and `ROTARY_EMBEDDING`.
    least_for_vision : (int, int)
        The first for the vision graph, which has none of those.
    last_major : int
        Last major version whose interface is known to have what is called here; the next one may remove it.
    keeps_times : bool
        It times kernels, and a later build may use the times.
    """

    name, extra, module = "tensorrt", "trt", "tensorrt"
    least_version = (10, 15)
    least_for_vision = (10, 14)  # as beside TensorRT-LLM's last engines
    last_major = 11
    keeps_times = True

    def load(self, graph: str = "decoder") -> Any:
        """The module, of a version that compiles a graph.

        Raises
        ------
        DeviceUnavailable
            It is not installed, its libraries do not load, or it is too old or too new.
        """
        try:
            library = importlib.import_module(self.module)
            version = tuple(int(part) for part in re.findall(r"\d+", library.__version__)[:2])
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reason = (str(error).splitlines() or ["no message"])[0]
            raise DeviceUnavailable(
                f"{self.name} cannot be loaded ({type(error).__name__}: {reason}); {remedy(self.extra)}"
            ) from None
        is_installed = f"{self.name} {library.__version__} is installed"
        needed = self.least_for_vision if graph == "vision" else self.least_version
        if version < needed:
            least = ".".join(map(str, needed))
            raise DeviceUnavailable(
                f"{is_installed}, {least} is the least that has the {graph}'s layers; {remedy(self.extra)}"
            )
        if version[0] > self.last_major:
            raise DeviceUnavailable(
                f"{is_installed}, {self.last_major}.x is the last that is supported; {remedy(self.extra)}"
            )
        return library

    def target(self, recipe: Recipe) -> Target:
        """What a recipe's plans are built for: the GPU that is here, which has to be of the recipe's kind.

        Raises
        ------
        DeviceUnavailable
            There is none, or another one.
        """
        from cxr_triton.engines.cuda import device

        found = device()
        if found.compute_capability != recipe.compute_capability:
            raise DeviceUnavailable(
                f"recipe {recipe.name} is for compute capability {recipe.compute_capability} ({recipe.gpu}), this "
                f"machine has a {found.name} with {found.compute_capability}; TensorRT times kernels where it builds: "
                "build there"
            )
        return Target(found.compute_capability, found.name)

    def configure(self, trt: Any, config: Any, target: Target) -> None:
        """Set in a builder's config what the library wants to be told of the target."""

    def kernels(self, trt: Any, engine: Any, plan: Path, gpu: str) -> Any:
        """What the library compiles when a plan is opened, kept with `write`; None if nothing."""
        return None


def logger(trt, what: str):
    """What a builder or a runtime writes to; `what` names the library for messages."""

    class Log(trt.ILogger):
        """Keeps errors, and the sizes that the builder reports."""

        def __init__(self):
            trt.ILogger.__init__(self)
            self.what = what  # is logged
            self.errors: list[str] = []
            self.reported: dict[str, list[int]] = {key: [] for key in _REPORTED}

        def log(self, severity, message):
            if severity <= trt.ILogger.ERROR:
                self.errors.append(_SOURCE.sub("", message.strip()))
            elif severity == trt.ILogger.INFO:
                for key, pattern in _REPORTED.items():
                    if found := pattern.search(message):
                        self.reported[key].append(int(found[1]))

        @property
        def last(self) -> str:
            """The last error; empty if there is none."""
            return self.errors[-1] if self.errors else ""

    return Log()
