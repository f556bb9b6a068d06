"""llama.cpp on the text decoder: a GGUF of the checkpoint, in its own 4-bit formats, through llama-cpp-python.

Its Python need not be ours: what runs there imports nothing of ours that is not in Python's own library or numpy.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from cxr_triton.errors import BuildFailed, InternalError, UnsupportedCheckpoint
from cxr_triton.export.geometry import read_config
from cxr_triton.export.safetensors import Entry, read_header
from cxr_triton.files import new_folder
from cxr_triton.perf.peers.peer import Peer, told
from cxr_triton.perf.process import Process

STREAMS, CONTEXT, BATCH = 8, 8192, 512
GGUF = "decoder.gguf"


class LlamaCpp(Peer):
    """Greedy, all streams in each step; its threads wait actively, so its process has to be gone before others run."""

    packages = ("llama-cpp-python", "gguf", "numpy")
    scope = "decoder"
    elsewhere = True
    variable = "CXR_LLAMA_CPP_PYTHON"
    kind: ClassVar[str]

    @classmethod
    def prepare(cls, checkpoint: Path, work: Path) -> Path:
        folder = work / f"llama-cpp-{cls.kind.lower()}"
        if not folder.exists():
            with new_folder(folder) as new:
                converter = Process(Converter, sorted(os.sched_getaffinity(0)), python=cls.python())
                try:
                    converter.call("convert", str(checkpoint), str(new / GGUF), cls.kind)
                finally:
                    converter.kill()
        return folder

    @classmethod
    def step_bytes(cls, folder: Path, streams: int = 1) -> int:
        return (folder / GGUF).stat().st_size

    def __init__(self, folder: str):
        import llama_cpp

        self.library, threads = silent(llama_cpp), len(os.sched_getaffinity(0))
        self.model = llama_cpp.llama_model_load_from_file(
            str(Path(folder) / GGUF).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = CONTEXT, BATCH, BATCH, STREAMS
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings) if self.model else None
        if not self.context:
            raise InternalError(f"llama.cpp does not load {folder}")
        self.vocab = llama_cpp.llama_n_vocab(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def write(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        arrivals: list[list[float]] = [[] for _ in prompts]
        started_s, last = time.perf_counter(), []
        for stream, ids in enumerate(prompts):
            for begin in range(0, len(ids), BATCH):
                part = ids[begin : begin + BATCH]
                rows = self._decode([(token, begin + at, stream) for at, token in enumerate(part)])
            last.append(rows[-1])
            arrivals[stream].append(time.perf_counter())
        for step in range(tokens - 1):
            entries = [(token, len(prompts[stream]) + step, stream) for stream, token in enumerate(last)]
            last = self._decode(entries, is_each_wanted=True)
            for arrived in arrivals:
                arrived.append(time.perf_counter())
        return told(started_s, arrivals)

    def _decode(self, entries: Sequence[tuple[int, int, int]], *, is_each_wanted: bool = False) -> list[int]:
        """Likeliest tokens after (token, position, stream) entries: after the last one, or after each."""
        batch, wanted = self.batch, []
        batch.n_tokens = len(entries)
        for at, (token, position, stream) in enumerate(entries):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, position, 1, stream
            batch.logits[at] = is_each_wanted or at == len(entries) - 1
            wanted += [at] if batch.logits[at] else []
        if status := self.library.llama_decode(self.context, batch):
            raise InternalError(f"llama_decode answers {status}")
        logits = (self.library.llama_get_logits_ith(self.context, at) for at in wanted)
        return [int(np.ctypeslib.as_array(row, (self.vocab,)).argmax()) for row in logits]


class Q4_0(LlamaCpp):
    """Blocks of 32 values with one scale, the head in 6 bits."""

    title = "llama.cpp Q4_0, decoder only"
    kind = "Q4_0"


class Q4KM(LlamaCpp):
    """What its users take most: super-blocks of 256 values, some matrices in 6 bits."""

    title = "llama.cpp Q4_K_M, decoder only"
    kind = "Q4_K_M"


class Converter:
    """Writes a quantized GGUF of a checkpoint's text decoder, in the Python that has gguf and llama_cpp."""

    def convert(self, checkpoint: str, out: str, kind: str) -> None:
        """Through a file in bf16, in the system's folder for temporary ones, which has to hold it."""
        import llama_cpp

        with tempfile.TemporaryDirectory() as scratch:
            whole = f"{scratch}/{GGUF}"
            write_gguf(Path(checkpoint), whole)
            settings = silent(llama_cpp).llama_model_quantize_default_params()
            settings.ftype, settings.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 0
            if llama_cpp.llama_model_quantize(whole.encode(), out.encode(), settings):
                raise BuildFailed(f"llama_model_quantize does not write {kind} of {checkpoint}")


def write_gguf(checkpoint: Path, out: str) -> None:
    """The text decoder of a checkpoint in bf16, without a tokenizer: it is given token ids.

    Raises
    ------
    UnsupportedCheckpoint
        A tensor is in another type.
    """
    import gguf

    text, _ = read_config(json.loads((checkpoint / "config.json").read_text("utf-8")))
    writer = gguf.GGUFWriter(out, "qwen2vl")
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_rope_dimension_sections([*text.mrope_section, 0])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(text.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL, text.num_hidden_layers)
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            ours = name.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
            if theirs := names.get_name(ours, try_suffixes=(".weight", ".bias")):
                _add(writer, theirs, entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer, name: str, entry: Entry) -> None:
    import gguf

    if entry.dtype != "BF16":
        raise UnsupportedCheckpoint(f"{entry.path} holds {entry.dtype}; llama.cpp gets a checkpoint in BF16")
    stored = np.memmap(entry.path, np.uint16, "r", entry.offset, entry.shape)
    if len(entry.shape) == 1:
        writer.add_tensor(name, (stored.astype(np.uint32) << 16).view(np.float32))
    else:
        writer.add_tensor(name, stored.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)


def silent(library):
    """Without its log, which says hundreds of lines for each model; its callback has to outlive what logs."""
    library.cxr_log = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(library.cxr_log, None)
    return library
