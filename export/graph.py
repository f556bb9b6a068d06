"""Write an ONNX graph whose weights stream from a checkpoint into external data, in the precision asked for.

A `GraphWriter` is a context: weights go to the data file as their nodes are authored, both files appear under
their names only when the block ends well, and nothing is left behind when it does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from cxr_triton.errors import InvalidRequest, UnsupportedCheckpoint
from cxr_triton.export.checkpoint import Checkpoint, Fp8Weight, Int4Weight
from cxr_triton.export.progress import bar

BLOCK, SMALL_BLOCK = 128, 32  # int4 weights that share one scale; the second where the first does not divide K
INT4_MAX = 7
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = 448
QUANTIZED = ("fp8", "int4-awq")
"""Precisions that are read from a quantized checkpoint, under the name of its scheme."""

_FLOATS: dict[str, tuple[int, np.dtype]] = {
    "fp32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
_TYPES: dict[np.dtype, int] = {dtype: kind for kind, dtype in _FLOATS.values()} | {
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.bool_): TensorProto.BOOL,
    FP8: TensorProto.FLOAT8E4M3FN,
}
_IR_VERSION = 11
_ALIGNMENT = 4096  # a page: engines map the data file instead of copying it
_CHUNK_BYTES = 2 << 20  # fp32 rows converted at a time: within a core's L2, or the transposed writes take twice as long
_INLINE_BYTES = 1024  # smaller constants stay in the graph, where shape inference reads them


@dataclass(frozen=True)
class Precision:
    """What a graph stores and what it computes in.

    Attributes
    ----------
    weights : {"fp32", "fp16", "bf16", "int4", "fp8", "int4-awq"}
        Linear layers. int4: round to nearest, symmetric, one scale for each block of 128 weights along K (32 where
        128 does not divide K). fp8 and int4-awq: as a quantized checkpoint holds them.
    compute : {"fp32", "fp16", "bf16"}
        Type of activations, KV cache, biases and int4 scales. Residual stream, norms, rotary embedding and softmax
        are fp32 in every case; scales of fp8 are fp32.
    head : {"compute", "fp8", "int4"}
        The language head: in the compute type (a tied one then shares the embedding table), or a tensor of its own,
        rounded to nearest: int4 in blocks, or fp8 with one scale, on an input in fp8 by the scale that was calibrated.
    """

    weights: str
    compute: str
    head: str

    @classmethod
    def of(cls, weights: str, compute: str | None = None, head: str | None = None) -> Precision:
        """Fill in defaults: quantized weights compute in fp32, the others in their own type.

        The head of int4 is int4, every other one in the compute type.

        Raises
        ------
        InvalidRequest
            An unknown name, or a combination that does not exist.
        """
        if weights not in (*_FLOATS, "int4", *QUANTIZED):
            raise InvalidRequest(
                f"precision {weights!r} is unknown; choose {', '.join((*_FLOATS, 'int4', *QUANTIZED))}"
            )
        if weights in _FLOATS:
            compute, head = compute or weights, head or "compute"
            if compute != weights or head != "compute":
                raise InvalidRequest(
                    f"precision {weights} computes in {weights} with a {weights} head, {compute} with head {head} was "
                    f"asked for; compute and head are free with precision int4 only, and {' or '.join(QUANTIZED)}"
                )
        else:
            compute, head = compute or "fp32", head or ("int4" if weights == "int4" else "compute")
        heads = ("compute", "int4", "fp8")
        if compute not in _FLOATS or head not in heads:
            raise InvalidRequest(
                f"compute {compute!r} with head {head!r} is unknown; choose {', '.join(_FLOATS)} and {', '.join(heads)}"
            )
        return cls(weights, compute, head)


@dataclass(frozen=True)
class Form:
    """A form in which an export holds the decoder.

    Attributes
    ----------
    name : str
        As `--format` takes it.
    precision : callable
        `Precision` of the names of weights, compute and head, as `Precision.of`.
    write : callable
        Takes the checkpoint, the folder of the export, the precision, the longest prompt and answer in tokens and
        whether to show a bar.
    default : str
        Weights of a plain checkpoint.
    takes_adapter : bool
        A LoRA adapter may lie beside it.
    """

    name: str
    precision: Callable[[str, str | None, str | None], Precision]
    write: Callable[[Checkpoint, Path, Precision, int, bool | None], object]
    default: str = "int4"
    takes_adapter: bool = False


class GraphWriter:
    """Author of one ONNX file and its `.data` file.

    Parameters
    ----------
    path : Path
        The `.onnx` file; weights go to `path.name + ".data"` beside it.
    opset : int
    precision : Precision
    source_bytes : int
        Bytes of checkpoint tensors that will be read, for the progress bar.
    progress : bool, optional
        Show the bar on standard error; by default only on a terminal.
    """

    def __init__(
        self, path: Path, opset: int, precision: Precision, *, source_bytes: int = 0, progress: bool | None = None
    ):
        self.path, self.opset, self.precision = Path(path), opset, precision
        self.kind, self.dtype = _FLOATS[precision.compute]
        self._data_path = self.path.with_name(self.path.name + ".data")
        self._partial = [p.with_name(p.name + ".partial") for p in (self._data_path, self.path)]
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._nodes: list[NodeProto] = []
        self._initializers: list[TensorProto] = []
        self._names: set[str] = set()
        self._rounded: dict[tuple[str, np.float32], str] = {}  # inputs in float8 by name and scale
        self._source_bytes, self._progress = source_bytes, progress

    def __enter__(self) -> GraphWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._data = open(self._partial[0], "wb")
        self._bar = bar(self._source_bytes, self.path.name, self._progress, unit="B", unit_scale=True)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._bar.close()
        self._data.close()
        try:
            if kind is None:
                self._write_graph()
                # The graph is what a reader opens: it comes last, when its data is in place.
                os.replace(self._partial[0], self._data_path)
                os.replace(self._partial[1], self.path)
        finally:
            for path in self._partial:
                path.unlink(missing_ok=True)

    def input(self, name: str, kind: int, shape: list) -> str:
        """Declare an input; gives its name."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: list) -> str:
        """Declare an output, which a node of its name gives."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def node(self, op: str, *inputs: str, name: str | None = None, outputs: int = 1, **attributes):
        """Add a node; gives the name of its output, or the list of names where `outputs` is over 1."""
        name = name or f"{op}_{len(self._nodes)}"
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(op, inputs, names, name=name, **attributes))
        return name if outputs == 1 else names

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """A small constant, stored once for each name; one over 1 KiB goes to the data file."""
        if name not in self._names:
            self._names.add(name)
            value = np.ascontiguousarray(value)
            if value.nbytes > _INLINE_BYTES:
                self._external(name, _TYPES[value.dtype], value.shape, [value])
            else:
                tensor = TensorProto(name=name, data_type=_TYPES[value.dtype], dims=value.shape)
                tensor.raw_data = value.tobytes()
                self._initializers.append(tensor)
        return name

    def ints(self, *values: int) -> str:
        """A constant int64 vector, as Reshape and Unsqueeze take it."""
        return self.constant("ints_" + "_".join(str(v) for v in values), np.array(values, np.int64))

    def cast(self, x: str, kind: int) -> str:
        """X in the type that `TensorProto` numbers so."""
        return self.node("Cast", x, to=kind)

    def to_compute(self, x: str) -> str:
        """fp32 to the compute type."""
        return x if self.kind == TensorProto.FLOAT else self.cast(x, self.kind)

    def to_fp32(self, x: str) -> str:
        """Compute type to fp32."""
        return x if self.kind == TensorProto.FLOAT else self.cast(x, TensorProto.FLOAT)

    def vector(self, name: str, value: np.ndarray, dtype: np.dtype | None = None) -> str:
        """A bias or norm weight, in the compute type or `dtype`."""
        self._bar.update(value.nbytes)
        return self.constant(name, np.asarray(value, dtype or self.dtype))

    def table(self, name: str, value: np.ndarray, dtype: np.dtype) -> str:
        """A matrix as it stands in the checkpoint, [rows, columns], converted chunk by chunk."""
        if name not in self._names:
            self._names.add(name)
            self._external(name, _TYPES[dtype], value.shape, (value[rows].astype(dtype) for rows in _chunks(value)))
            self._bar.update(value.nbytes)
        return name

    def linear(
        self, x: str, name: str, weight: np.ndarray | Fp8Weight | Int4Weight, bias: np.ndarray | None = None
    ) -> str:
        """`x · weightᵀ + bias` with a checkpoint weight [N, K], stored as [K, N] in the form that it has.

        [..., K] compute type → [..., N] compute type.
        """
        if isinstance(weight, Fp8Weight):
            self._bar.update(weight.nbytes)
            x = self._float8(x, weight.input_scale)
            stored = self._fp8(name, weight.values.view(np.uint8).T, weight.scale)
        elif isinstance(weight, Int4Weight):
            if weight.pre_quant_scale is not None:
                module = name.removesuffix("weight")
                x = self.node("Mul", x, self.vector(f"{module}pre_quant_scale", weight.pre_quant_scale))
            stored = self._awq(name, weight)
        else:
            stored = self._transposed(name, weight)
        return self._biased(self.node("MatMul", x, stored), name, bias)

    def int4(self, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
        """`linear` with a float weight that is rounded to int4 blocks here."""
        return self._biased(self.node("MatMul", x, self._int4(name, weight)), name, bias)

    def fp8(self, x: str, name: str, weight: np.ndarray, input_scale: np.float32) -> str:
        """`linear` with a float weight that is rounded to float8 here, by one scale: its largest value is 448."""
        largest = max(float(np.abs(weight[rows].astype(np.float32)).max()) for rows in _chunks(weight))
        scale = np.float32(largest / FP8_MAX) if largest else np.float32(1)
        values = np.empty(weight.shape[::-1], np.uint8)
        for rows in _chunks(weight):
            # Clipped: the largest one's quotient may come out just above the type's end.
            quotients = np.clip(weight[rows].astype(np.float32) / scale, -FP8_MAX, FP8_MAX)
            values[:, rows] = quotients.astype(FP8).view(np.uint8).T
        self._bar.update(weight.nbytes)
        return self.node("MatMul", self._float8(x, input_scale), self._fp8(name, values, scale))

    def _biased(self, y: str, name: str, bias: np.ndarray | None) -> str:
        if bias is None:
            return y
        return self.node("Add", y, self.vector(name.removesuffix("weight") + "bias", bias))

    def _float8(self, x: str, scale: np.float32) -> str:
        """X rounded to float8 · scale, [..., K] compute type; one pair of nodes for layers that share x and scale."""
        if (x, scale) not in self._rounded:
            scale_name = self.constant(f"{x}.float8_scale.{scale.tobytes().hex()}", np.asarray(scale, np.float32))
            values = self.node("QuantizeLinear", x, scale_name, self._float8_zero())
            self._rounded[x, scale] = self._dequantized(values, scale_name)
        return self._rounded[x, scale]

    def _fp8(self, name: str, values: np.ndarray, scale: np.float32) -> str:
        """Bytes of float8 [K, N] and their scale as a weight in the compute type."""
        self._external(f"{name}.float8", TensorProto.FLOAT8E4M3FN, values.shape, [values])
        return self._dequantized(f"{name}.float8", self.constant(f"{name}.scale", np.asarray(scale, np.float32)))

    def _float8_zero(self) -> str:
        return self.constant("float8_zero", np.zeros((), FP8))

    def _dequantized(self, values: str, scale: str) -> str:
        # The scale stays fp32, to the bit; the type that comes out is named, because it follows the scale otherwise.
        typed: dict[str, Any] = {} if self.kind == TensorProto.FLOAT else {"output_dtype": self.kind}
        return self.node("DequantizeLinear", values, scale, self._float8_zero(), **typed)

    def _awq(self, name: str, weight: Int4Weight) -> str:
        n, k = 2 * weight.packed.shape[0], weight.packed.shape[1]
        block = k // weight.scales.shape[1]
        # Two rows share a byte there, two columns here: the same bytes, transposed.
        self._external(f"{name}.int4", TensorProto.INT4, (k, n), [weight.packed.T])
        self._external(f"{name}.scale", self.kind, (k // block, n), [weight.scales.T.astype(self.dtype)])
        self._bar.update(weight.nbytes)
        return self.node("DequantizeLinear", f"{name}.int4", f"{name}.scale", axis=0, block_size=block)

    def _transposed(self, name: str, weight: np.ndarray) -> str:
        out = np.empty(weight.shape[::-1], self.dtype)
        for rows in _chunks(weight):
            out[:, rows] = weight[rows].T
        self._external(name, self.kind, out.shape, [out])
        self._bar.update(weight.nbytes)
        return name

    def _int4(self, name: str, weight: np.ndarray) -> str:
        n, k = weight.shape
        if k % SMALL_BLOCK:
            raise UnsupportedCheckpoint(
                f"{name} has {k} input features, a multiple of {SMALL_BLOCK} is needed for int4; use another precision"
            )
        block = SMALL_BLOCK if k % BLOCK else BLOCK
        quantized = np.empty((k, n), np.int8)
        scales = np.empty((k // block, n), self.dtype)
        for rows in _chunks(weight):
            blocks = weight[rows].astype(np.float32).reshape(-1, k // block, block)
            # Rounded to the stored type first, so that the integers fit the scale that will multiply them.
            scale = (np.abs(blocks).max(-1) / INT4_MAX).astype(self.dtype)
            scale[scale == 0] = 1  # a block of zeros, or one below the type's range
            scales[:, rows] = scale.T
            blocks /= scale.astype(np.float32)[..., None]
            np.rint(blocks, out=blocks)
            np.clip(blocks, -INT4_MAX - 1, INT4_MAX, out=blocks)
            quantized[:, rows] = blocks.reshape(-1, k).T
        self._bar.update(weight.nbytes)
        self._external(f"{name}.int4", TensorProto.INT4, (k, n), _packed(quantized))
        self._external(f"{name}.scale", self.kind, scales.shape, [scales])
        return self.node("DequantizeLinear", f"{name}.int4", f"{name}.scale", axis=0, block_size=block)

    def _external(self, name: str, kind: int, shape: tuple[int, ...], chunks) -> None:
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        offset = self._data.tell()
        for chunk in chunks:
            self._data.write(np.ascontiguousarray(chunk).view(np.uint8).data)
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        facts = {"location": self._data_path.name, "offset": offset, "length": self._data.tell() - offset}
        for key, value in facts.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers.append(tensor)

    def _write_graph(self) -> None:
        graph = helper.make_graph(self._nodes, self.path.stem, self._inputs, self._outputs, self._initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=_IR_VERSION,
            producer_name="cxr-triton",
        )
        self._partial[1].write_bytes(model.SerializeToString())


def _chunks(weight: np.ndarray) -> list[slice]:
    """Row ranges of a matrix whose fp32 copies stay under `_CHUNK_BYTES`."""
    rows = max(1, _CHUNK_BYTES // (4 * weight[0].size))
    return [slice(start, min(start + rows, len(weight))) for start in range(0, len(weight), rows)]


def _packed(quantized: np.ndarray):
    """int4 [K, N] as bytes, the earlier value in the low half, in chunks of whole bytes (K is even)."""
    k, n = quantized.shape
    rows = max(2, _CHUNK_BYTES // n // 2 * 2)
    for start in range(0, k, rows):
        flat = quantized[start : start + rows].reshape(-1).view(np.uint8)
        yield (flat[0::2] & 0xF) | (flat[1::2] << 4)


def check(path: Path) -> None:
    """Structure, operators, types and shapes by ONNX's own checker, strictly.

    Raises
    ------
    onnx.checker.ValidationError, onnx.shape_inference.InferenceError
    """
    onnx.checker.check_model(str(path), full_check=True)
