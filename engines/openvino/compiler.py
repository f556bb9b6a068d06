"""Graphs in OpenVINO's own form, which it compiles for the CPU that it finds when they are opened."""

from __future__ import annotations

import functools
import tempfile
from importlib import metadata
from pathlib import Path

from cxr_triton.engines.attention import split_attention
from cxr_triton.engines.patches import drop_padding
from cxr_triton.engines.rewrite import fuse_int4, merge_projections, rewrite
from cxr_triton.errors import BuildFailed, DeviceUnavailable
from cxr_triton.extras import remedy


def compile_graph(source: Path, folder: Path, precision: str) -> str:
    """Write a graph of an export as OpenVINO's ``NAME.xml`` and ``NAME.bin``, and give OpenVINO's version.

    For bf16, fp32 weights are stored in fp16: a checkpoint's bf16 values come through exactly from 6e-5 up, and to 3e-8
    below.

    Parameters
    ----------
    source : Path
        ``vision.onnx`` or ``decoder.onnx`` of an export; its ``.data`` file lies beside it.
    folder : Path
    precision : {"fp32", "bf16"}
        What it will compute in.

    Raises
    ------
    DeviceUnavailable
        OpenVINO is not installed.
    BuildFailed
        OpenVINO does not take the graph.
    """
    openvino = load_library()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rewritten = Path(scratch) / source.name
        if source.stem == "decoder":
            rewrite(source, rewritten, split_attention, fuse_int4, merge_projections)
        else:
            rewrite(source, rewritten, drop_padding)
        source = rewritten
        try:
            model = open_core().read_model(source)
            openvino.save_model(model, folder / f"{source.stem}.xml", compress_to_fp16=precision == "bf16")
        except RuntimeError as error:
            raise BuildFailed(
                f"openvino does not take {source.name}: {' '.join(str(error).split())[-400:]}; name a recipe with "
                "another compiler"
            ) from None
    return metadata.version("openvino")


def load_library():
    """The module `openvino`.

    Raises
    ------
    DeviceUnavailable
        It is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise DeviceUnavailable(f"openvino does not load here ({error}); {remedy('openvino')}") from None
    return openvino


def open_core():
    """The process's one `openvino.Core`, which is never freed.

    The CPU plugin gives the thread that makes it an alternate signal stack. Freed by another thread, as a garbage
    collection may, it unmaps that stack and leaves it the first thread's: the next signal ends the process, Ctrl-C too.

    Raises
    ------
    DeviceUnavailable
        OpenVINO is not installed.
    """
    return _core_of(load_library())


@functools.cache
def _core_of(openvino):
    return openvino.Core()
