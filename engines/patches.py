"""A tower that computes the patches that exist, none of the padding of their windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cxr_triton.engines.rewrite import Author, Weights, replace_nodes
from cxr_triton.errors import BuildFailed

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

WINDOW, UNIT = 64, 4  # patches of a window, and of a token
_INT64 = 7  # as ONNX counts types
_ANOTHER = "vision.onnx is not built as this version builds it; export the checkpoint again"
_PER_PATCH = {"pixel_scale", "rotary_axes"}  # constants that the bytes and the place of each patch meet first


def drop_padding(graph: GraphProto, weights: Weights) -> None:
    """Between bytes and tokens, `vision.onnx` of an export works on rows [N, hidden] of the N patches of all images.

    An image of 34 by 34 patches has 1,156, its 25 windows have 1,600. Attention alone needs sequences of one length:
    rows are put into windows [windows, 64], or images [B, M] for as many rows as the largest has, and back. The merger
    gets the rows of each token in the order of the tokens.

    Raises
    ------
    BuildFailed
        The graph is not built as this version's export builds it.
    """
    author = _Rows(graph, weights)
    for node in list(graph.node):
        author.write(node)
    if author.inputs != len(_PER_PATCH):
        raise BuildFailed(_ANOTHER)
    replace_nodes(graph, author.nodes)


class _Rows(Author):
    """Author of the nodes that find the rows, and of those of the tower, which then work on them."""

    def __init__(self, graph: GraphProto, weights: Weights):
        super().__init__(weights)
        self.inputs = 0  # that are rows now
        self._shapes = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "Reshape"}
        self._used_by = {name: node for node in graph.node for name in node.input}  # one of them
        self._kinds = {name: node.op_type for node in graph.node for name in node.output}
        units = [values for shape in set(self._shapes.values()) if len(values := self._values(shape)) == 3]
        if len(units) != 1:
            raise BuildFailed(_ANOTHER)
        self._width = units[0][2] // UNIT
        self._in_images = False  # the block that is written attends over images
        self._find_rows()
        self._find_images()

    def _find_rows(self) -> None:
        """Where each of the rows [N] is among the patches of all windows, and which row each of those is, or some."""
        node, ints = self.node, self.ints
        valid = node("Reshape", "valid", ints(-1), name="rows.valid")
        self._present = node("Squeeze", node("NonZero", valid, name="rows.found"), ints(0), name="rows")
        counted = node("CumSum", node("Cast", valid, name="rows.ones", to=_INT64), self.scalar(0), name="rows.counted")
        before = node("Sub", counted, self.scalar(1), name="rows.before")
        self._row = node("Max", before, self.scalar(0), name="rows.of_patches")
        self._windows = node("Reshape", self._row, ints(-1, WINDOW), name="rows.of_windows")

    def _find_images(self) -> None:
        """Rows [B, M] of the images, some row where an image has none, a bias that hides these, and the way back.

        M is a multiple of 64: sums over rows of another length may be rounded otherwise, and an image's embeddings must
        not depend on what it is batched with.
        """
        node, ints, zero, one, whole = self.node, self.ints, self.scalar(0), self.scalar(1), self.scalar(WINDOW)
        ones = node("Cast", "valid", name="images.ones", to=_INT64)
        counts = node("ReduceSum", ones, ints(1, 2), name="images.counts", keepdims=0)
        starts = node("CumSum", counts, zero, name="images.starts", exclusive=1)
        windows = node(
            "Div", node("Add", counts, self.scalar(WINDOW - 1), name="images.up"), whole, name="images.windows"
        )
        most = node("Mul", node("ReduceMax", windows, name="images.widest", keepdims=0), whole, name="images.most")
        ranks = node("Range", zero, most, one, name="images.ranks")
        held = node("Less", ranks, node("Unsqueeze", counts, ints(1), name="images.sizes"), name="images.held")
        rows = node("Add", ranks, node("Unsqueeze", starts, ints(1), name="images.first"), name="images.rows")
        last = node("Sub", node("Size", self._present, name="rows.count"), one, name="rows.last")
        self._images = node("Min", rows, last, name="rows.of_images")
        self._bias = node("Where", held, "present", "absent", name="images.bias")
        found = node("NonZero", node("Reshape", held, ints(-1), name="images.flat"), name="images.found")
        self._in_image = node("Squeeze", found, ints(0), name="images.back")

    def write(self, old: NodeProto) -> None:
        """What comes in the place of a node of the tower."""
        kind, first, result = old.op_type, old.input[0], old.output[0]
        if kind == "Cast" and _PER_PATCH.intersection(self._used_by[result].input):
            flat = self.node("Flatten", first, name=f"{first}.flat", axis=3)
            old.input[0] = self.node("Gather", flat, self._present, name=f"{first}.rows")
            self.inputs += 1
        elif kind == "Gather" and old.input[1] == "rotary_axes":
            old.attribute[0].i = -1
        elif kind == "Split" and len(old.output) == 3:  # query, key and value
            self._in_images = self._is_of_images(self._used_by[result])
            old.input[0] = self._in_sequences(first, self._in_images, result)
        elif kind == "Reshape" and self._kinds.get(first) in ("Cos", "Sin"):
            old.input[0] = self._in_sequences(first, self._is_of_images(old), result)
        elif kind == "Reshape" and self._kinds.get(first) == "Where" and self._is_of_images(old):
            old.input[0] = self._bias
        elif kind == "Reshape" and self._kinds.get(old.input[1]) == "Shape":  # behind attention
            flat = self.node("Reshape", first, self.ints(-1, self._width), name=f"{result}.flat")
            back = self._in_image if self._in_images else self._present
            self.node("Gather", flat, back, name=result)
            return
        elif kind == "Reshape" and len(self._values(old.input[1])) == 3:  # before the merger
            old.input[0] = self.node("Gather", first, self._rows_of_tokens(), name=f"{result}.ordered")
        elif kind == "GatherND":
            self.node("Identity", first, name=result)
            return
        self.nodes.append(old)

    def _in_sequences(self, rows: str, in_images: bool, name: str) -> str:
        return self.node("Gather", rows, self._images if in_images else self._windows, name=f"{name}.sequences")

    def _rows_of_tokens(self) -> str:
        """Rows [B, T · 4] of the patches of tokens in the order of `merge_order`."""
        node, ints = self.node, self.ints
        rows = node("Reshape", self._row, node("Shape", "valid", name="images.shape"), name="images.patches")
        units = node("Reshape", rows, ints(0, -1, UNIT), name="images.units")
        order = node("Cast", "merge_order", name="tokens.order", to=_INT64)
        order = node("Unsqueeze", order, ints(-1), name="tokens.index")
        rows = node("GatherND", units, order, name="tokens.units", batch_dims=1)
        return node("Reshape", rows, ints(0, -1), name="tokens.rows")

    def _values(self, shape: str) -> list[int]:
        """Of a constant shape; none of a computed one."""
        return list(self.weights.value(shape)) if shape in self.weights else []

    def _is_of_images(self, reshape: NodeProto) -> bool:
        return self._values(reshape.input[1])[0] == 0
