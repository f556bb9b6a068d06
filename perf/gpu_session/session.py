"""What the steps of a session share: models of two sizes, their bundles and sessions, and rows that are kept."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from cxr_triton.errors import CxrError, DeviceUnavailable
from cxr_triton.files import write
from cxr_triton.perf.gpu_session.machine import gpu

if TYPE_CHECKING:
    from cxr_triton.engines.bundle import Bundle
    from cxr_triton.engines.recipe import Recipe

PRECISIONS = ("bf16", "int4-awq")
IMAGES = (1, 8, 32)
MAX_SEQUENCE = 2560
CPU, GPU = "onnxruntime", "onnxruntime-cuda"
"""Engine that the others are held against, and the one that every step is about."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """A size of model, with random weights of the real layout."""

    name: str
    text: dict
    vision: dict


def scales(is_dry: bool) -> dict[str, Scale]:
    """Sizes by name, the one to measure last."""
    from cxr_triton.engines.recipe import TEXT_3B, VISION_3B

    text = TEXT_3B | {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    vision = VISION_3B | {
        "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "depth": 2, "out_hidden_size": 512,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    small = Scale("small", text, vision)
    return {"small": small} if is_dry else {"small": small, "3b": Scale("3b", TEXT_3B, VISION_3B)}


class Session:
    """What the steps share: folders, the machine, and rows that are kept as they come.

    Parameters
    ----------
    out : Path
        Results.
    work : Path
        Checkpoints, exports and bundles; kept between steps.
    tokenizer : Path
        Folder with ``tokenizer.json`` and ``chat_template.jinja`` of the real vocabulary.
    is_dry : bool
        Small shapes on a CPU, in fp32 and int4.
    """

    def __init__(self, out: Path, work: Path, tokenizer: Path, is_dry: bool):
        self.out, self.work, self.tokenizer, self.is_dry = out, work, tokenizer, is_dry
        self.scales = scales(is_dry)
        self.precisions = ("fp32", "int4") if is_dry else PRECISIONS
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)

    def add(self, step: str, **row) -> None:
        """Keep a row of a step."""
        rows = [*self.rows(step), row]
        write(self.out / f"{step}.json", json.dumps(rows, indent=1))
        click.echo(f"{step}: {_line(row)}", err=True)

    def rows(self, step: str) -> list[dict]:
        """What a step has kept so far."""
        path = self.out / f"{step}.json"
        return json.loads(path.read_text()) if path.exists() else []

    @contextmanager
    def noting(self, step: str, **about) -> Iterator[dict]:
        """Keep a row with how long the block took and what it found; an error becomes its exact message."""
        row, started_s = dict(about), time.perf_counter()
        try:
            yield row
            row["ok"] = row.get("ok", True)
        except (Exception, SystemExit) as error:
            message = error.wire() if isinstance(error, CxrError) else f"{type(error).__name__}: {error}"
            row |= {"ok": False, "error": message[:2000]}
        row["seconds"] = round(time.perf_counter() - started_s, 2)
        self.add(step, **row)

    @contextmanager
    def _making(self, name: str) -> Iterator[Path | None]:
        """A new folder's path while nobody else makes it, or None if it is there already."""
        folder = self.work / name
        with open(self.work / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield None if folder.exists() else folder

    def checkpoint(self, scale: Scale, scheme: str | None = None) -> Path:
        """Random weights, written once."""
        from cxr_triton.perf.shape import write_shape

        name = f"{scale.name}-{scheme or 'bf16'}"
        with self._making(name) as folder:
            if folder:
                partial = folder.with_name(f".{name}")
                write_shape(
                    partial, self.tokenizer, scheme=scheme, text_values=scale.text, vision_values=scale.vision,
                    normal=None if self.is_dry else _gpu_normal,
                )  # fmt: skip
                os.replace(partial, folder)
        return self.work / name

    def export(self, scale: Scale, precision: str, compute: str) -> Path:
        """An export folder, written once."""
        from cxr_triton.export.export import export_checkpoint
        from cxr_triton.profile import load_profile

        source = self.checkpoint(scale, precision if precision == "int4-awq" else None)
        name = f"export-{scale.name}-{precision}-{compute}"
        with self._making(name) as folder:
            if folder:
                profile = dataclasses.replace(load_profile("nv-reason-cxr-3b"), checkpoint=None)  # of any scale
                export_checkpoint(
                    str(source), folder, profile, precision=precision, compute=compute,
                    head="int4" if precision == "int4-awq" else None, max_sequence=MAX_SEQUENCE, accept_licence=True,
                    progress=False,
                )  # fmt: skip
        return self.work / name

    def bundle(self, scale: Scale, precision: str, engine: str = GPU) -> Bundle:
        """A bundle for an engine, built once."""
        from cxr_triton.engines.build import build_bundle
        from cxr_triton.engines.bundle import Bundle

        compute = "fp32" if self.is_dry or engine == CPU else "bf16"
        if engine == CPU and precision == "bf16":
            precision = "fp32"
        name = f"bundle-{scale.name}-{engine}-{precision}"
        export = self.export(scale, precision, compute)
        with self._making(name) as folder:
            if folder and self.is_dry and engine != CPU:
                self._host_bundle(scale, precision, export, folder)
            elif folder:
                build_bundle(export, folder, recipe=None if engine == CPU else self._recipe(engine, export))
        if self.is_dry and engine != CPU:
            return dataclasses.replace(self.bundle(scale, precision, CPU), path=self.work / name)
        return Bundle.open(self.work / name, verify=False)

    def _host_bundle(self, scale: Scale, precision: str, export: Path, folder: Path) -> None:
        """The GPU's graphs in fp32, which a CPU runs; no recipe has them."""
        from cxr_triton.engines.onnxruntime_cuda.compiler import compile_graph

        plain, partial = self.bundle(scale, precision, CPU), folder.with_name(f".{folder.name}")
        shutil.copytree(plain.path, partial)
        for graph in ("vision", "decoder"):
            compile_graph(export / f"{graph}.onnx", partial, plain.geometry.max_sequence)
        os.replace(partial, folder)

    def _recipe(self, engine: str, export: Path) -> Recipe:
        """Recipe of the H100 with another compiler, for the GPU that is here."""
        from cxr_triton.engines.recipe import load_recipe

        base, held, here = load_recipe("h100-int4-ort"), json.loads((export / "export.json").read_bytes()), gpu()
        if here is None:
            raise DeviceUnavailable("torch finds no GPU here; pass --dry-run for a CPU")
        return dataclasses.replace(
            base,
            compute_capability=here["compute_capability"],
            vision=dataclasses.replace(base.vision, compiler=engine),
            decoder=dataclasses.replace(base.decoder, compiler=engine, precision=held["precision"], head=held["head"]),
            max_sequence=MAX_SEQUENCE,
            image_budget=max(IMAGES),
            thresholds={},
        )

    def decoder(self, bundle: Bundle, slots: int):
        """A decoder session; in a dry run that of the GPU's graph has the host's memory."""
        from cxr_triton.engines.onnxruntime_cuda.session import CudaDecoder, Host

        if self.is_dry and GPU in bundle.path.name:
            return CudaDecoder(bundle, slots=slots, memory=Host())
        return bundle.open_decoder(slots=slots)

    def vision(self, bundle: Bundle):
        """A vision session, likewise."""
        from cxr_triton.engines.onnxruntime_cuda.session import CudaVision, Host

        if self.is_dry and GPU in bundle.path.name:
            return CudaVision(bundle, memory=Host())
        return bundle.open_vision()

    @property
    def arguments(self) -> list[str]:
        """Of a command that works on the same folders."""
        folders = ["--out", str(self.out), "--work", str(self.work), "--tokenizer", str(self.tokenizer)]
        return folders + ["--dry-run"] * self.is_dry


def _gpu_normal(rows: int, columns: int, scale: float):
    """Values drawn on the GPU, bf16 [rows, columns]."""
    import ml_dtypes
    import torch

    drawn = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).mul_(scale)
    return drawn.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)


def _line(row: dict) -> str:
    shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    return ", ".join(shown)[:300]


def pictures(geometry, count: int, side: int = 448) -> dict[str, np.ndarray]:
    """Inputs of the vision tower: `count` pictures of noise, `side` pixels high and wide."""
    from cxr_triton.pixels import image

    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 256, (side, side), np.uint8) for _ in range(count)]
    budgets = {"window_budget": geometry.window_budget, "token_budget": geometry.token_budget}
    return image.stack([image.windows(picture, **budgets) for picture in drawn])


def cosines(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of the rows [..., values] of both."""
    a, b = (part.reshape(-1, part.shape[-1]).astype(np.float64) for part in (expected, found))
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
