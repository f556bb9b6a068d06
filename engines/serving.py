"""What is served for a bundle: how much of it, and the tensors between the models."""

from __future__ import annotations

from dataclasses import dataclass, field

from cxr_triton.errors import InvalidRequest

BUNDLE = "decoder/1/bundle"
"""Where the bundle lies in a repository."""
ENSEMBLE = "cxr_reader"
"""The model that a client asks: all steps, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a repository is served.

    Parameters
    ----------
    slots : int, optional
        Streams that decode at the same time; each takes a KV cache of the bundle's whole context. By default 4, or as
        many as the engine was built for.
    preprocess_instances : int
        Processes that decode images, each with a sandboxed child.
    threads : int
        CPU threads of each of the two graphs; 0 takes all cores.
    vision_threads : int, optional
        CPU threads of the tower, where they are others.
    prefill_chunk : int
        Prompt tokens of one run of the decoder, for which the running streams wait; 0 leaves it to the engine.
    vision_batch : int, optional
        Most images in one run of the tower; by default 8, or as many as a request may have.
    queue_size : int
        Requests that may wait before each of preprocessing, vision encoder and decoder; one more is QUEUE_FULL.
    batch_invariant : bool
        A reading never depends on what else runs, to the last bit; see `Bundle.open_decoder`.
    prefix_reuse : bool, optional
        The engine keeps keys and values for prompts that begin alike, images included. By default where that was run:
        on a CPU.
    prefix_cache_mib : int
        Memory of the host for them; 0 keeps none. An engine with a paged cache keeps them there instead.
    drafts : bool, optional
        Guess tokens from earlier answers, and check several in a step. By default where the engine does; not with
        `batch_invariant`, as a token's numbers then depend on how many are checked with it.
    draft_index_mib : int
        Memory of the host for earlier answers; 0 guesses nothing.
    picture_cache_mib : int
        Memory of the vision encoder for embeddings of pictures that it encoded; 0 keeps none.
    options : dict of str to str
        What only the bundle's engine has, by the names of `Engine.options`.
    """

    slots: int | None = None
    preprocess_instances: int = 2
    threads: int = 0
    vision_threads: int | None = None
    prefill_chunk: int = 0
    vision_batch: int | None = None
    queue_size: int = 64
    batch_invariant: bool = False
    prefix_reuse: bool | None = None
    prefix_cache_mib: int = 512
    drafts: bool | None = None
    draft_index_mib: int = 16
    picture_cache_mib: int = 256
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        at_least = {"slots": 1, "preprocess_instances": 1, "threads": 0, "queue_size": 1}
        at_least |= {"vision_threads": 0, "prefill_chunk": 0, "vision_batch": 1}
        memory = ("prefix_cache_mib", "draft_index_mib", "picture_cache_mib")
        for name, least in (at_least | dict.fromkeys(memory, 0)).items():
            if (value := getattr(self, name)) is not None and value < least:
                raise InvalidRequest(f"{name} is {value}, must be at least {least}")
        if self.prefix_reuse and not self.prefix_cache_mib:
            raise InvalidRequest("prefix_reuse is asked for with prefix_cache_mib 0; give it memory, or leave it out")
        if self.drafts and not self.draft_index_mib:
            raise InvalidRequest("drafts are asked for with draft_index_mib 0; give them memory, or leave them out")
        if self.drafts and self.batch_invariant:
            raise InvalidRequest("drafts are asked for with batch_invariant, which they are not; leave one of them out")


_PATCHES = ("PIXEL_WINDOWS", "PATCH_ROWS_COLS", "VALID", "MERGE_ORDER")
_PROMPT = ("INPUT_IDS", "IMAGE_INDEX", "POSITION_IDS")
STEPS = {
    "dicom_preprocess": (("IMAGES", "REQUEST"), (*_PATCHES, *_PROMPT, "CONTEXT")),
    "vision_encoder": (_PATCHES, ("IMAGE_EMBEDDINGS",)),
    "decoder": ((*_PROMPT, "IMAGE_EMBEDDINGS", "CONTEXT"), ("TEXT", "TOKEN_IDS", "STREAM", "COMPLETION")),
    "report": (("TEXT", "STREAM", "COMPLETION"), ("DELTA", "READING")),
}
"""Tensors that each step takes and gives, in the order of the ensemble."""


def tensors(geometry, embeddings: str) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor between the steps; images are the batch of `vision_encoder`.

    Parameters
    ----------
    geometry : Geometry
    embeddings : str
        Type of the image embeddings, as ``TYPE_FP32``.
    """
    windows, tokens = geometry.window_budget, geometry.token_budget
    text = ("TYPE_STRING", [1])
    return {
        "IMAGES": ("TYPE_STRING", [-1]),
        "REQUEST": text,
        "PIXEL_WINDOWS": ("TYPE_UINT8", [-1, windows, 64, 588]),
        "PATCH_ROWS_COLS": ("TYPE_INT32", [-1, windows, 64, 2]),
        "VALID": ("TYPE_BOOL", [-1, windows, 64]),
        "MERGE_ORDER": ("TYPE_INT32", [-1, tokens]),
        "INPUT_IDS": ("TYPE_INT64", [-1]),
        "IMAGE_INDEX": ("TYPE_INT64", [-1]),
        "POSITION_IDS": ("TYPE_INT64", [3, -1]),
        "IMAGE_EMBEDDINGS": (embeddings, [-1, tokens, geometry.hidden]),
        "CONTEXT": text,
        "STOP": text,
        "TEXT": text,
        "TOKEN_IDS": ("TYPE_INT32", [-1]),
        "STREAM": text,
        "COMPLETION": text,
        "DELTA": text,
        "READING": text,
    }


def declare(model, inputs, outputs, known: dict, *, skip: int = 0, name_of=str) -> None:
    """Give a `ModelConfig` its inputs and outputs.

    Parameters
    ----------
    model : ModelConfig
    inputs, outputs : iterable of str
        Names in `known`, which is of `tensors`.
    known : dict
    skip : int
        Dimensions that Triton leaves out: 1 with batches, else 0.
    name_of : callable
        The model's own name of a tensor.
    """
    from tritonclient.grpc.model_config_pb2 import DataType

    for tensors_of_model, names in ((model.input, inputs), (model.output, outputs)):
        for name in names:
            kind, shape = known[name]
            tensors_of_model.add(name=name_of(name), data_type=DataType.Value(kind), dims=shape[skip:])
