"""ONNX Runtime's CUDA provider: both graphs written for the kernels that it has.

The decoder becomes 11 nodes a layer: projections of query, key and value side by side, rotary embedding, cache and
attention in one `GroupQueryAttention`, residual sum and norm in one `SkipSimplifiedLayerNormalization`. Its residual
stream has the compute type, as that of transformers has. Nothing of a graph is bound to one GPU. The operators exist
on ONNX Runtime's CPU too, where the tests run them in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.rewrite import Weights, joined, pack_int4, replace_nodes, rewrite
from cxr_triton.errors import BuildFailed

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

INT4_BLOCK = 32
"""Weights that share one scale: the provider's weight-only kernels (fpA_intB) are built for this number only. Larger
blocks of an export are repeated, so values stay the same. A product of few columns and many rows keeps its own, because
there the provider's other kernels were faster (docs/gpu-results.md)."""
TOP_BLOCKS = 8
"""Blocks of neighbouring ids with the largest logits, which a step gives in full."""
MOST_BLOCKS = 256
"""TopK sorts so many at once; with 1,187 it took four times as long."""
MLP_MULTIPLE = 64
_TABLE = "language_model.embed_tokens.weight"
_MICROSOFT = "com.microsoft"


def compile_graph(source: Path, folder: Path, max_sequence: int) -> None:
    """Write a graph of an export as ``NAME.onnx`` and ``NAME.onnx.data`` for the CUDA provider.

    Parameters
    ----------
    source : Path
        ``vision.onnx`` or ``decoder.onnx`` of an export; its ``.data`` file lies beside it.
    folder : Path
    max_sequence : int
        Positions of a slot of the cache.

    Raises
    ------
    BuildFailed
        The decoder has weights of a kind that the provider has no kernel for.
    """
    target = folder / source.name
    if source.stem == "decoder":
        rewrite(source, target, lambda graph, weights: _Decoder(graph, weights, max_sequence).write())
    else:
        rewrite(source, target, fuse_norms, fuse_silu, fuse_rotary, pad_mlp, fp32_embeddings, opset=23)


class _Decoder:
    """Author of the decoder from the tensors of an export's.

    Inputs and outputs beside those of the export, for B sequences of S tokens:

    =============  ==================  =========================================================================
    last_index     [B] int32           index of a sequence's last token, the new ones included
    longest        [1] int32, host     positions that attention may have to read
    rotary_index   [B, S] int64        0 to B · S - 1: a token's row among those of this run
    logits_index   [B] int64           row among all B · S tokens, in the place of the export's [B, P]
    logits         [B, vocab] fp32
    top_blocks     [B, 8] int64        blocks of ids with the largest logits, the best first
    top_logits     [B, 8, block] fp32  their logits
    =============  ==================  =========================================================================
    """

    def __init__(self, graph: GraphProto, weights: Weights, max_sequence: int):
        from onnx import TensorProto, helper

        self.graph, self.weights, self.max_sequence = graph, weights, max_sequence
        inputs = {value.name: value.type.tensor_type for value in graph.input}
        shapes = {name: [d.dim_value for d in kind.shape.dim] for name, kind in inputs.items()}
        _, self.kv_heads, _, self.head_dim = shapes["past_key.0"]
        self.hidden = shapes["image_embeddings"][1]
        self.heads = self.hidden // self.head_dim
        self.layers = sum(name.startswith("past_key.") for name in inputs)
        self.vocab = next(v.type.tensor_type.shape.dim[2].dim_value for v in graph.output if v.name == "logits")
        self.block = 128 * -(-self.vocab // (128 * MOST_BLOCKS))
        self.top = min(TOP_BLOCKS, -(-self.vocab // self.block))
        self.kind = inputs["image_embeddings"].elem_type
        self.dtype = helper.tensor_dtype_to_np_dtype(self.kind)
        self.float, self.int64, self.int32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
        norm = next(node for node in graph.node if node.op_type == "RMSNormalization")
        self.epsilon = next(a.f for a in norm.attribute if a.name == "epsilon")
        self.dequantized = {n.input[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
        self.nodes: list[NodeProto] = []

    def write(self) -> None:
        """Put inputs, outputs and nodes in the place of the export's."""
        x = self._embed()
        rotary = self._rotary()
        y = self._node("SimplifiedLayerNormalization", x, self._norm(0, "input"), axis=-1, epsilon=self.epsilon)
        for i in range(self.layers):
            x, y = self._layer(i, x, y, rotary)
        self._head(y)
        self._declare()
        replace_nodes(self.graph, self.nodes)

    def _node(
        self, op: str, *inputs: str, name: str | None = None, domain: str = "", outputs=None, **attributes
    ) -> str:
        from onnx import helper

        name = name or f"{op}_{len(self.nodes)}"
        results = outputs or [name]
        self.nodes.append(helper.make_node(op, inputs, results, name, domain=domain, **attributes))
        return results[0]

    def _ints(self, *values: int) -> str:
        return self.weights.add(f"int64_{'_'.join(map(str, values))}", lambda: np.array(values, np.int64))

    def _cast(self, x: str, kind: int) -> str:
        return self._node("Cast", x, to=kind)

    def _vector(self, name: str) -> str:
        """A norm's weight in the compute type; bf16 holds those of a checkpoint to the bit."""
        return self.weights.add(f"{name}.typed", lambda: self.weights.value(name).astype(self.dtype))

    def _norm(self, layer: int, which: str) -> str:
        if layer == self.layers:
            return self._vector("language_model.norm.weight")
        return self._vector(f"language_model.layers.{layer}.{which}_layernorm.weight")

    def _embed(self) -> str:
        """[B, S, hidden]: rows of the table, or of image_embeddings where image_index is not -1."""
        zero = self.weights.add("first_row", lambda: np.array(0, np.int64))
        rows = self._node("Gather", _TABLE, "input_ids", axis=0)
        if self.weights.exported[_TABLE].data_type != self.kind:
            rows = self._cast(rows, self.kind)
        image = self._node("Gather", "image_embeddings", self._node("Max", "image_index", zero), axis=0)
        is_image = self._node("Unsqueeze", self._node("GreaterOrEqual", "image_index", zero), self._ints(-1))
        return self._node("Where", is_image, image, rows)

    def _rotary(self) -> tuple[str, str]:
        """Cos and sin of each token of the run, [B · S + max_sequence, head_dim / 2].

        Attention looks rows up by `rotary_index`, so M-RoPE's three axes need no kernel of their own. The rows of
        zeros make the tables as long as attention wants them, the sequence's longest length.
        """
        half = self.head_dim // 2
        positions = self._node("Transpose", self._cast("position_ids", self.float), perm=[1, 2, 0])
        positions = self._node("Gather", positions, "rotary_axes", axis=2)
        angles = self._node("Reshape", self._node("Mul", positions, "rotary_frequencies"), self._ints(-1, half))
        rest = self.weights.add("rotary_rest", lambda: np.zeros((self.max_sequence, half), self.dtype))

        def table(op: str) -> str:
            values = self._node(op, angles)
            values = values if self.kind == self.float else self._cast(values, self.kind)
            return self._node("Concat", values, rest, axis=0)

        return table("Cos"), table("Sin")

    def _layer(self, i: int, x: str, y: str, rotary: tuple[str, str]) -> tuple[str, str]:
        """Residual stream and its norm, before a layer and before the next one."""
        prefix = f"language_model.layers.{i}"
        query = self._linear(y, *(f"{prefix}.self_attn.{part}_proj" for part in "qkv"))
        caches = [f"past_key.{i}", f"past_value.{i}"]
        y = self._node(
            "GroupQueryAttention", query, "", "", *caches, "last_index", "longest", *rotary, "rotary_index",
            name=f"{prefix}.attention", domain=_MICROSOFT, num_heads=self.heads, kv_num_heads=self.kv_heads,
            scale=self.head_dim**-0.5, do_rotary=1,
            outputs=[f"{prefix}.attention", f"present_key.{i}", f"present_value.{i}"],
        )  # fmt: skip
        x, y = self._skip(self._linear(y, f"{prefix}.self_attn.o_proj"), x, self._norm(i, "post_attention"))
        gate = self._node("QuickGelu", self._linear(y, f"{prefix}.mlp.gate_proj"), domain=_MICROSOFT, alpha=1.0)
        y = self._node("Mul", gate, self._linear(y, f"{prefix}.mlp.up_proj"))
        return self._skip(self._linear(y, f"{prefix}.mlp.down_proj"), x, self._norm(i + 1, "input"))

    def _skip(self, y: str, x: str, weight: str) -> tuple[str, str]:
        """X + y, and its norm."""
        name = f"SkipNorm_{len(self.nodes)}"
        normed, total = f"{name}.norm", f"{name}.sum"
        self._node(
            "SkipSimplifiedLayerNormalization", y, x, weight, name=name, domain=_MICROSOFT, epsilon=self.epsilon,
            outputs=[normed, "", "", total],
        )  # fmt: skip
        return total, normed

    def _linear(self, x: str, *modules: str) -> str:
        """Products with the weights of modules, side by side; biases where the export has them."""
        weights = self.weights
        names = [f"{module}.weight" for module in modules]
        biases = [name for module in modules if (name := f"{module}.bias") in weights]
        bias = biases[0] if len(biases) == 1 else joined(weights, f"{modules[0]}.biases", biases, 0) if biases else ""
        if (scale := f"{modules[0]}.pre_quant_scale") in weights:
            x = self._node("Mul", x, scale)
        if f"{names[0]}.int4" in weights:
            y = self._int4(x, names)
            return self._node("Add", y, bias) if bias else y
        if any(name not in weights for name in names):
            raise BuildFailed(f"onnxruntime-cuda takes {names[0]} in bf16, fp16 or int4; export with another precision")
        stored = names[0] if len(names) == 1 else joined(weights, f"{names[0]}.joined", names, 1)
        y = self._node("MatMul", x, stored)
        return self._node("Add", y, bias) if bias else y

    def _int4(self, x: str, names: list[str]) -> str:
        weights = self.weights
        (block,) = {a.i for a in self.dequantized[f"{names[0]}.int4"].attribute if a.name == "block_size"}
        sizes = [tuple(weights.exported[f"{name}.int4"].dims) for name in names]
        k, n = sizes[0][0], sum(size[1] for size in sizes)
        shared = block if k >= 4 * n else INT4_BLOCK

        def packed() -> np.ndarray:
            parts = [pack_int4(weights.value(f"{name}.int4"), *size) for name, size in zip(names, sizes, strict=True)]
            return np.concatenate(parts).reshape(n, k // shared, shared // 2)

        def scales() -> np.ndarray:
            by_column = np.concatenate([weights.value(f"{name}.scale").T.ravel() for name in names])
            return np.repeat(by_column, block // shared)

        inputs = [x, weights.add(f"{names[0]}.packed", packed), weights.add(f"{names[0]}.scales", scales)]
        return self._node("MatMulNBits", *inputs, domain=_MICROSOFT, K=k, N=n, bits=4, block_size=shared)

    def _head(self, y: str) -> None:
        """Logits of one token of each sequence, and those of the blocks that hold the largest."""
        rows = self._node("Reshape", y, self._ints(-1, self.hidden))
        rows = self._node("Gather", rows, "logits_index", axis=0)
        if "lm_head.weight.int4" in self.weights:
            logits = self._int4(rows, ["lm_head.weight"])
        else:
            table = "lm_head.weight" if "lm_head.weight" in self.weights else _TABLE
            logits = self._node("Gemm", rows, table, transB=1)
        logits = self._node("Cast", logits, to=self.float, name="logits")
        if beyond := -self.vocab % self.block:
            least = self.weights.add("least", lambda: np.full((), -np.inf, np.float32))
            logits = self._node("Pad", logits, self._ints(0, 0, 0, beyond), least)
        blocks = self._node("Reshape", logits, self._ints(0, -1, self.block))
        largest = self._node("ReduceMax", blocks, self._ints(-1), keepdims=0)
        self._node("TopK", largest, self._ints(self.top), outputs=["top_values", "top_blocks"], axis=-1)
        index = self._node("Unsqueeze", "top_blocks", self._ints(-1))
        self._node("GatherND", blocks, index, name="top_logits", batch_dims=1)

    def _declare(self) -> None:
        from onnx import ValueInfoProto, helper

        def declared(name: str, kind: int, *shape: str | int) -> ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, shape)

        graph = self.graph
        kept = [v for v in graph.input if v.name not in ("write_index", "logits_index")]
        kept += [
            declared("last_index", self.int32, "B"),
            declared("longest", self.int32, 1),
            declared("rotary_index", self.int64, "B", "S"),
            declared("logits_index", self.int64, "B"),
        ]
        caches = [v for v in graph.output if v.name.startswith("present_")]
        for value in (*kept, *caches):
            if value.name.startswith(("past_", "present_")):
                value.type.tensor_type.shape.dim[2].dim_value = self.max_sequence
        outputs = [
            declared("logits", self.float, "B", self.vocab),
            declared("top_blocks", self.int64, "B", self.top),
            declared("top_logits", self.float, "B", self.top, self.block),
            *caches,
        ]
        for field, values in ((graph.input, kept), (graph.output, outputs)):
            held = [ValueInfoProto.FromString(value.SerializeToString()) for value in values]
            del field[:]
            field.extend(held)


def fuse_norms(graph: GraphProto, weights: Weights) -> None:
    """Square, mean, root and quotient become one `SimplifiedLayerNormalization`."""
    from onnx import helper

    made_by = {node.output[0]: node for node in graph.node}
    nodes = []
    for node in graph.node:
        divided = made_by.get(node.input[0]) if node.op_type == "Mul" else None
        if divided is None or divided.op_type != "Div" or made_by[divided.input[1]].op_type != "Sqrt":
            nodes.append(node)
            continue
        inputs = [divided.input[0], node.input[1]]
        epsilon = float(weights.value(made_by[made_by[divided.input[1]].input[0]].input[1]).item())
        fused = helper.make_node(
            "SimplifiedLayerNormalization", inputs, node.output, node.name, axis=-1, epsilon=epsilon
        )
        nodes.append(fused)
    replace_nodes(graph, nodes)


def fuse_silu(graph: GraphProto, weights: Weights) -> None:
    """X · sigmoid(x) becomes one `QuickGelu`."""
    from onnx import helper

    made_by = {node.output[0]: node for node in graph.node}
    nodes = []
    for node in graph.node:
        sigmoid = made_by.get(node.input[1]) if node.op_type == "Mul" else None
        if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.input[0] != node.input[0]:
            nodes.append(node)
            continue
        x = node.input[:1]
        nodes.append(helper.make_node("QuickGelu", x, node.output, node.name, domain=_MICROSOFT, alpha=1.0))
    replace_nodes(graph, nodes)


def fuse_rotary(graph: GraphProto, weights: Weights) -> None:
    """Halves, four products, sum, difference and their joining become one `RotaryEmbedding` of opset 23."""
    from onnx import helper

    made_by = {name: node for node in graph.node for name in node.output}
    tables: dict[str, str] = {}
    nodes = []

    def table(name: str) -> str:
        """Cos or sin [N, 1, L, D / 2] without its axis of heads."""
        if name not in tables:
            tables[name] = f"{name}.rows"
            axis = weights.add("axis_1", lambda: np.array([1], np.int64))
            nodes.append(helper.make_node("Squeeze", [name, axis], [tables[name]], tables[name]))
        return tables[name]

    for node in graph.node:
        parts = [made_by[name] for name in node.input if name in made_by] if node.op_type == "Concat" else []
        if [part.op_type for part in parts] != ["Sub", "Add"]:
            nodes.append(node)
            continue
        by_cos, by_sin = (made_by[name] for name in parts[0].input)
        x = made_by[by_cos.input[0]].input[0]  # of the Split
        inputs = [x, *(table(product.input[1]) for product in (by_cos, by_sin))]
        nodes.append(helper.make_node("RotaryEmbedding", inputs, node.output, node.name))
    replace_nodes(graph, nodes)


def pad_mlp(graph: GraphProto, weights: Weights) -> None:
    """Widen the MLPs to a multiple of 64 by zeros: for 3,420 columns cuBLAS took a kernel of older GPUs."""
    columns = {node.input[1] for node in graph.node if node.op_type in ("MatMul", "Add")}
    for name in sorted(columns):
        if ".mlp." not in name or "merger" in name or name not in weights:
            continue
        axis = 0 if "down_proj.weight" in name else -1
        if "down_proj.bias" in name or not (more := -weights.exported[name].dims[axis] % MLP_MULTIPLE):
            continue

        def widened(name=name, axis=axis, more=more) -> np.ndarray:
            value = weights.value(name)
            width = [(0, 0)] * value.ndim
            width[axis] = (0, more)
            return np.pad(value, width)

        padded = weights.add(f"{name}.padded", widened)
        for node in graph.node:
            for index, used in enumerate(node.input):
                if used == name:
                    node.input[index] = padded


def fp32_embeddings(graph: GraphProto, weights: Weights) -> None:
    """Have the tower give fp32, which numpy can take."""
    from onnx import TensorProto, helper

    (output,) = graph.output
    if output.type.tensor_type.elem_type == TensorProto.FLOAT:
        return
    for node in graph.node:
        if node.output[0] == output.name:
            node.output[0] = f"{output.name}.typed"
    graph.node.append(helper.make_node("Cast", [f"{output.name}.typed"], [output.name], to=TensorProto.FLOAT))
    output.type.tensor_type.elem_type = TensorProto.FLOAT
