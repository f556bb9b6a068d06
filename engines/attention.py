"""A decoder's attention by products of matrices alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.engines.rewrite import Author, Weights, replace_nodes

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def split_attention(graph: GraphProto, weights: Weights) -> None:
    """Attention over a cache that the graph only reads, and over the new tokens, whose keys and values it gives.

    For engines without an operator that writes into its input, or with none that takes several tokens of several
    sequences. ``present_key.i`` and ``present_value.i`` become [B, kv_heads, S, head_dim], the new tokens' own, which
    the session puts into the cache (`HostGraph.append`). No keys or values of the cache are copied, neither for that
    nor for the query heads that share a key; each row attends over the whole of it, what it does not see hidden.
    """
    made_by = {name: node for node in graph.node for name in node.output}
    author = _Attention(graph, weights)
    for node in graph.node:
        if node.op_type == "Attention":
            author.write(node, [made_by[name] for name in node.input[1:3]])
        elif node.op_type != "TensorScatter":
            author.nodes.append(node)
    for value in graph.output:
        if value.name.startswith("present_"):
            value.type.tensor_type.shape.dim[2].dim_param = "S"
    replace_nodes(graph, author.nodes)


class _Attention(Author):
    """Author of the nodes that attend, for B sequences of S new tokens over a cache of C positions."""

    def __init__(self, graph: GraphProto, weights: Weights):
        super().__init__(weights)
        shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
        _, kv_heads, _, head_dim = shapes["past_key.0"]
        heads, ints, node = shapes["image_embeddings"][1] // head_dim, self.ints, self.node
        self._size = node("Shape", "past_key.0", name="cache_size", start=2, end=3)
        self._count = node("Shape", "input_ids", name="new_count", start=1, end=2)
        self._biases = self._visible()
        self._grouped = ints(0, kv_heads, -1, head_dim)
        per_token = ints(0, kv_heads, heads // kv_heads)
        self._by_token = node("Concat", per_token, self._count, ints(-1), name="scores_by_token", axis=0)
        both = node("Add", self._size, self._count, name="all_count")
        self._flat = node("Concat", ints(0, kv_heads, -1), both, name="flat", axis=0)
        self._whole = node("Concat", ints(0, heads), self._count, ints(head_dim), name="whole", axis=0)
        self._scale = weights.add("attention_scale", lambda: np.array(head_dim**-0.5, np.float32))

    def write(self, old: NodeProto, writes: list[NodeProto]) -> None:
        """What comes in the place of an `Attention` and of the two nodes that write its keys and values."""
        from onnx import helper

        node, layer = self.node, old.name
        cached = [write.input[0] for write in writes]
        fresh = [node("Identity", write.input[1], name=write.output[0]) for write in writes]
        query = node("Reshape", old.input[0], self._grouped, name=f"{layer}.grouped")
        query = node("Mul", query, self._scale, name=f"{layer}.scaled")
        scores = []
        for part, keys, bias in zip(("cache", "new"), (cached[0], fresh[0]), self._biases, strict=True):
            turned = node("Transpose", keys, name=f"{layer}.{part}_turned", perm=[0, 1, 3, 2])
            product = node("MatMul", query, turned, name=f"{layer}.{part}_product")
            product = node("Reshape", product, self._by_token, name=f"{layer}.{part}_by_token")
            scores.append(node("Add", product, bias, name=f"{layer}.{part}_scores"))
        shares = node("Softmax", node("Concat", *scores, name=f"{layer}.scores", axis=-1), name=f"{layer}.shares")
        shares = node("Reshape", shares, self._flat, name=f"{layer}.flat_shares")
        sizes = node("Concat", self._size, self._count, name=f"{layer}.sizes", axis=0)
        parts = [f"{layer}.cache_shares", f"{layer}.new_shares"]
        self.nodes.append(helper.make_node("Split", [shares, sizes], parts, f"{layer}.split", axis=-1))
        sums = [
            node("MatMul", share, values, name=f"{share}_sum")
            for share, values in zip(parts, (cached[1], fresh[1]), strict=True)
        ]
        total = node("Add", *sums, name=f"{layer}.sum")
        self.nodes.append(helper.make_node("Reshape", [total, self._whole], old.output, layer))

    def _visible(self) -> tuple[str, str]:
        """Cache positions [B, 1, 1, 1, C] and new tokens [S, S] that a new token sees, as a bias on its scores."""
        node, zero, one = self.node, self.scalar(0), self.scalar(1)
        held = node("Range", zero, node("Squeeze", self._size, name="cache_length"), one, name="cache_positions")
        new = node("Range", zero, node("Squeeze", self._count, name="new_length"), one, name="new_positions")
        written = node("Unsqueeze", "write_index", self.ints(1, 2, 3, 4), name="written")
        later = node("Unsqueeze", new, self.ints(1), name="new_rows")
        visible = self.weights.add("visible", lambda: np.array(0, np.float32))
        hidden = self.weights.add("hidden", lambda: np.array(-1e30, np.float32))
        return (
            node("Where", node("Less", held, written, name="is_written"), visible, hidden, name="cache_bias"),
            node("Where", node("LessOrEqual", new, later, name="is_earlier"), visible, hidden, name="new_bias"),
        )
