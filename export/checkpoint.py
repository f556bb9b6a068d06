"""Read a Qwen2.5-VL checkpoint folder without torch: configs in every spelling, tensors by memory map.

Takes a folder (or a hub id, see `locate`), plain or quantized by nvidia-modelopt (unified Hugging Face layout); gives
the geometry, the token ids and numpy views of the tensors.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from cxr_triton.errors import UnsupportedCheckpoint
from cxr_triton.profile import eos_token_ids

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
QUANT_CONFIG = "hf_quant_config.json"
CALIBRATION = "calibration.json"  # what `cxr-triton quantize` leaves beside the weights
SCHEMES = {"FP8": "fp8", "W4A16_AWQ": "int4-awq"}  # modelopt's quant_algo, and our name
GROUP_SIZES = (32, 64, 128)  # block sizes of int4 that ONNX Runtime and TensorRT both take
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

_STORED = DTYPES | {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "U8": np.dtype(np.uint8)}
_ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What an export reads, and nothing else: no pickles, no code.
_HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer.json",
    "chat_template.*",
    CALIBRATION,
]


@dataclass(frozen=True)
class TextConfig:
    """Decoder geometry. The values here are the class defaults of transformers 5.23, which files leave out."""

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    use_sliding_window: bool = False
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower geometry. Files usually leave out depth, window and full-attention blocks: class defaults."""

    depth: int = 32
    hidden_size: int = 3584
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Quantization:
    """How the decoder's linear layers are stored, from `hf_quant_config.json`.

    Attributes
    ----------
    scheme : {"fp8", "int4-awq"}
    group_size : int or None
        Weights along K that share an int4 scale.
    exclude : tuple of str
        Patterns of modules that are not quantized, in the names of the file.
    kv : {"fp8"} or None
        Type that the KV cache was calibrated for.
    producer : str
        Name and version of the tool that wrote it.
    """

    scheme: str
    group_size: int | None
    exclude: tuple[str, ...]
    kv: str | None
    producer: str

    def excludes(self, module: str) -> bool:
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in self.exclude)


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A linear layer in float8 e4m3: weight = values · scale, input = its float8 value · input_scale.

    Attributes
    ----------
    values : (N, K) float8_e4m3fn array
    scale, input_scale : np.float32
    """

    values: np.ndarray
    scale: np.float32
    input_scale: np.float32

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A linear layer in int4 blocks: weight[n, k] = value[n, k] · scales[n, k // group], on input · pre_quant_scale.

    Attributes
    ----------
    packed : (N / 2, K) uint8 array
        Signed values; row 2r in the low half of a byte, row 2r + 1 in the high half.
    scales : (N, K / group) float32 array
    pre_quant_scale : (K,) array or None
        In the checkpoint's float type; None where modelopt folded it into the norm before.
    """

    packed: np.ndarray
    scales: np.ndarray
    pre_quant_scale: np.ndarray | None

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


class Checkpoint:
    """A Qwen2.5-VL checkpoint folder.

    Tensors go by one set of names whatever the file's layout: `language_model.*`, `visual.*` and `lm_head.weight`.

    Parameters
    ----------
    folder : path
        Holds `config.json` and `model.safetensors`, or its shards with `model.safetensors.index.json`.

    Attributes
    ----------
    text : TextConfig
    vision : VisionConfig
    tied : bool
        The head is the embedding table.
    image_token_id, vision_start_token_id : int
    eos_token_ids : tuple of int
        From `generation_config.json`, else from the config.
    generation : dict
        `generation_config.json`; empty if there is none.
    preprocessor : dict
        `preprocessor_config.json`, or the image processor's part of `processor_config.json`.
    quantization : Quantization or None
        None for plain weights.
    calibration : dict
        `calibration.json` of a quantized checkpoint; empty if there is none.

    Raises
    ------
    UnsupportedCheckpoint
        Another architecture or quantization, a missing or damaged file, or tensors that do not fit the config.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        config = self._json("config.json")
        _refuse_other_architectures(config)
        self.text, self.vision = read_config(config)
        text = config.get("text_config") or {}
        self.tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False))
        self.image_token_id = int(config.get("image_token_id", 151655))
        self.vision_start_token_id = int(config.get("vision_start_token_id", 151652))
        self.generation = self._json("generation_config.json") if (folder / "generation_config.json").exists() else {}
        self.eos_token_ids = eos_token_ids(self.generation, config)
        self.preprocessor = self._preprocessor()
        self.quantization = self._quantization(config)
        stored = self.quantization and (folder / CALIBRATION).exists()
        self.calibration = self._json(CALIBRATION) if stored else {}
        self._entries, self._file_names = self._canonical(self._read_headers())
        self._check_tensors()

    def array(self, name: str) -> np.ndarray:
        """Read-only view of a tensor, mapped from its file; the map goes when the view does.

        Parameters
        ----------
        name : str
            For instance `language_model.layers.0.mlp.up_proj.weight`.

        Returns
        -------
        np.ndarray
            float32, float16 or ml_dtypes.bfloat16, in the checkpoint's shape.
        """
        entry = self._entries[name]
        mapped = np.memmap(entry.path, np.uint8, "r", entry.offset, (entry.nbytes,))
        return mapped.view(_STORED[entry.dtype]).reshape(entry.shape)

    def dtype(self, name: str) -> np.dtype:
        return _STORED[self._entries[name].dtype]

    def weight(self, name: str) -> np.ndarray | Fp8Weight | Int4Weight:
        """The weight of a linear layer as it is stored, with the scales that belong to it.

        Parameters
        ----------
        name : str
            For instance `language_model.layers.0.mlp.up_proj.weight`.

        Raises
        ------
        UnsupportedCheckpoint
            A scale that is not a positive, finite number.
        """
        module, values = name.removesuffix(".weight"), self.array(name)
        if values.dtype == _STORED["F8_E4M3"]:
            scale, input_scale = (self._scales(f"{module}.{part}") for part in ("weight_scale", "input_scale"))
            return Fp8Weight(values, np.float32(scale.item()), np.float32(input_scale.item()))
        if values.dtype == _STORED["U8"]:
            smoothed = f"{module}.pre_quant_scale"
            return Int4Weight(
                values,
                self._scales(f"{module}.weight_scale"),
                self._scales(smoothed) if smoothed in self._entries else None,
            )
        return values

    def kv_scales(self) -> list[dict[str, float]]:
        """`key` and `value` scale of the float8 KV cache, layer by layer; empty where it was not calibrated."""
        if not self.quantization or self.quantization.kv is None:
            return []
        return [
            {
                part: self._scales(f"language_model.layers.{i}.self_attn.{part[0]}_proj.{part[0]}_scale").item()
                for part in ("key", "value")
            }
            for i in range(self.text.num_hidden_layers)
        ]

    def head_input_scale(self) -> np.float32 | None:
        """Scale of the language head's input in float8, from `calibration.json`; None where it was not calibrated."""
        amax = self.calibration.get("head_input_amax")
        if amax is None:
            return None
        if not isinstance(amax, float | int) or not 0 < amax < math.inf:
            raise UnsupportedCheckpoint(
                f"{self.folder / CALIBRATION} has head_input_amax {amax!r}, a positive number is needed; quantize again"
            )
        return np.float32(amax / 448)

    def _scales(self, name: str) -> np.ndarray:
        scales = self.array(name)
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise UnsupportedCheckpoint(
                f"{name} in {self._entries[name].path} holds values that are not positive and finite; quantize again"
            )
        return scales

    def nbytes(self, prefix: str = "") -> int:
        """Bytes of all tensors that the model uses and whose name starts with `prefix`."""
        return sum(e.nbytes for name, e in self._entries.items() if name.startswith(prefix))

    def side_files(self) -> dict[str, bytes]:
        """What a bundle carries beside the graphs, by its name there, from whatever file the checkpoint has it in.

        Raises
        ------
        UnsupportedCheckpoint
            No `tokenizer.json`, or no chat template.
        """
        tokenizer = self.folder / "tokenizer.json"
        if not tokenizer.exists():
            raise UnsupportedCheckpoint(
                f"{self.folder} has no tokenizer.json; write it with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        return {
            "tokenizer.json": tokenizer.read_bytes(),
            "chat_template.jinja": self._chat_template().encode(),
            "config.json": (self.folder / "config.json").read_bytes(),
            "generation_config.json": json.dumps(self.generation, indent=2).encode(),
            "preprocessor_config.json": json.dumps(self.preprocessor, indent=2).encode(),
        }

    def token_ids(self) -> dict[str, int]:
        """Id of every token that `tokenizer.json` names; empty without one."""
        if not (self.folder / "tokenizer.json").exists():
            return {}
        tokenizer = self._json("tokenizer.json")
        vocab = (tokenizer.get("model") or {}).get("vocab")
        ids = dict(vocab) if isinstance(vocab, dict) else {}
        added = [token for token in tokenizer.get("added_tokens") or () if isinstance(token, dict)]
        return ids | {token.get("content"): token.get("id") for token in added}

    def _chat_template(self) -> str:
        path = self.folder / "chat_template.jinja"
        if path.exists():
            return path.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = self._json(name).get("chat_template") if (self.folder / name).exists() else None
            if isinstance(template, str):
                return template
        raise UnsupportedCheckpoint(
            f"{self.folder} has no chat template (chat_template.jinja, chat_template.json or tokenizer_config.json); "
            "copy it from the checkpoint's source"
        )

    def digests(self) -> dict[str, str]:
        """sha256 of every file that this checkpoint is read from, by file name."""
        names = {entry.path.name for entry in self._entries.values()}
        names |= {path.name for pattern in _HUB_FILES for path in self.folder.glob(pattern)}
        result = {}
        for name in sorted(names):
            with open(self.folder / name, "rb") as file:
                result[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return result

    def _json(self, name: str) -> dict:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UnsupportedCheckpoint(
                f"{path} does not exist; give the folder of a Hugging Face checkpoint, or a hub id ORG/NAME"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise UnsupportedCheckpoint(f"{path} is not readable JSON ({error}); download it again") from None
        if not isinstance(value, dict):
            raise UnsupportedCheckpoint(f"{path} holds a {type(value).__name__}, not an object; download it again")
        return value

    def _preprocessor(self) -> dict:
        if (self.folder / "preprocessor_config.json").exists():
            return self._json("preprocessor_config.json")
        processor = self._json("processor_config.json") if (self.folder / "processor_config.json").exists() else {}
        if not isinstance(processor.get("image_processor"), dict):
            raise UnsupportedCheckpoint(
                f"{self.folder} has no preprocessor_config.json (mean, std and pixel limits of the images); "
                "copy it from the checkpoint's source"
            )
        return processor["image_processor"]

    def _read_headers(self) -> dict[str, _Entry]:
        index = self.folder / "model.safetensors.index.json"
        if not index.exists():
            return read_header(self.folder / "model.safetensors")
        weight_map = self._json(index.name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UnsupportedCheckpoint(f"{index} has no weight_map; download it again")
        shards = {}
        for file in sorted({str(file) for file in weight_map.values()}):
            if not file or Path(file).name != file or file.startswith("."):
                raise UnsupportedCheckpoint(f"{index} points to {file!r}, outside the folder; download it again")
            shards[file] = read_header(self.folder / file)
        entries = {}
        for name, file in weight_map.items():
            if name not in shards[file]:
                raise UnsupportedCheckpoint(f"{index} places {name} in {file}, which does not hold it; download again")
            entries[name] = shards[file][name]
        return entries

    def _quantization(self, config: dict) -> Quantization | None:
        path, announced = self.folder / QUANT_CONFIG, config.get("quantization_config")
        if not path.exists():
            if not announced:
                return None
            method = announced.get("quant_method", "unknown") if isinstance(announced, dict) else announced
            raise UnsupportedCheckpoint(
                f"the checkpoint is quantized ({method}) and has no {QUANT_CONFIG}; quantize the original weights with "
                "`cxr-triton quantize`"
            )
        whole = self._json(QUANT_CONFIG)
        values, producer = whole.get("quantization"), whole.get("producer") or {}
        if not isinstance(values, dict):
            raise UnsupportedCheckpoint(f"{path} has no object named quantization; quantize again")
        algorithm, kv, group = (values.get(key) for key in ("quant_algo", "kv_cache_quant_algo", "group_size"))
        if algorithm not in SCHEMES:
            raise UnsupportedCheckpoint(
                f"{path} has quant_algo {algorithm!r}; {', '.join(SCHEMES)} are exported: quantize with "
                "`cxr-triton quantize --scheme fp8` or `int4-awq`"
            )
        if kv not in (None, "FP8"):
            raise UnsupportedCheckpoint(f"{path} has kv_cache_quant_algo {kv!r}; FP8 or none is exported")
        scheme = SCHEMES[algorithm]
        if scheme == "int4-awq" and (group not in GROUP_SIZES or values.get("has_zero_point")):
            raise UnsupportedCheckpoint(
                f"{path} has group_size {group!r}, has_zero_point {values.get('has_zero_point')!r}; groups of "
                f"{', '.join(map(str, GROUP_SIZES))} without zero points are exported"
            )
        exclude = values.get("exclude_modules") or []
        if not isinstance(exclude, list) or not all(isinstance(pattern, str) for pattern in exclude):
            raise UnsupportedCheckpoint(f"{path} has exclude_modules {exclude!r:.60}, a list of names is needed")
        return Quantization(
            scheme=scheme,
            group_size=group if scheme == "int4-awq" else None,
            exclude=tuple(exclude),
            kv="fp8" if kv else None,
            producer=f"{producer.get('name', 'unknown')} {producer.get('version', 'unknown')}",
        )

    def _canonical(self, entries: dict[str, _Entry]) -> tuple[dict[str, _Entry], dict[str, str]]:
        """Entries under our names, and the file's name of each."""
        nested = any(name.startswith("model.language_model.") for name in entries)
        prefixes = (
            {"model.language_model.": "language_model.", "model.visual.": "visual."}
            if nested
            else {"model.": "language_model.", "visual.": "visual."}
        )
        names = {}
        for name in entries:
            old = next((old for old in prefixes if name.startswith(old)), "")
            names[prefixes.get(old, "") + name.removeprefix(old)] = name
        return {ours: entries[theirs] for ours, theirs in names.items()}, names

    def _check_tensors(self) -> None:
        layers = max(self.text.num_hidden_layers, self.vision.depth)
        if layers > len(self._entries):  # before a table of that many names is made
            raise UnsupportedCheckpoint(
                f"config.json asks for {layers} layers, {self.folder} has {len(self._entries)} tensors; "
                "config.json and weights are not of one checkpoint"
            )
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise UnsupportedCheckpoint(
                f"vision_config has out_hidden_size {self.vision.out_hidden_size}, the decoder has hidden_size "
                f"{self.text.hidden_size}; they have to be equal"
            )
        expected = {
            name: (shape, tuple(DTYPES)) for name, shape in tensor_shapes(self.text, self.vision, self.tied).items()
        }
        if self.quantization:
            expected = self._quantized(expected)
        for name, (shape, dtypes) in expected.items():
            entry = self._entries.get(name)
            if entry is None:
                raise UnsupportedCheckpoint(
                    f"{self.folder} has no tensor {name}, which its config calls for; "
                    "export merged weights (adapters are not read) and all files of the checkpoint"
                )
            if entry.dtype not in dtypes:
                raise UnsupportedCheckpoint(
                    f"{name} in {entry.path} is {entry.dtype}; {' or '.join(dtypes)} is read here"
                    + (f", by {QUANT_CONFIG}" if self.quantization else "")
                )
            if entry.shape not in (shape, (1,) if shape == () else shape):
                raise UnsupportedCheckpoint(
                    f"{name} in {entry.path} has shape {list(entry.shape)}, the config calls for {list(shape)}; "
                    "config.json and weights are not of one checkpoint"
                )
        self._entries = {name: self._entries[name] for name in expected}

    def _quantized(self, plain: dict) -> dict:
        """The tensors that a quantized checkpoint has in place of the plain ones: shape and types by name."""
        kind, float32 = self.quantization, ("F32",)
        expected = {}
        for name, (shape, dtypes) in plain.items():
            module = name.removesuffix(".weight")
            file_module = self._file_names.get(name, name).removesuffix(".weight")
            is_layer = name.startswith("language_model.layers.") and name.endswith("_proj.weight")
            if not is_layer or kind.excludes(file_module) or kind.excludes(module):
                expected[name] = shape, dtypes
                continue
            n, k = shape
            if kind.scheme == "fp8":
                expected[name] = shape, ("F8_E4M3",)
                expected[f"{module}.weight_scale"] = expected[f"{module}.input_scale"] = (), float32
            else:
                if n % 2 or k % kind.group_size:
                    raise UnsupportedCheckpoint(
                        f"{name} is [{n}, {k}], int4 needs an even number of rows and columns in groups of "
                        f"{kind.group_size}; quantize again"
                    )
                expected[name] = (n // 2, k), ("U8",)
                expected[f"{module}.weight_scale"] = (n, k // kind.group_size), float32
                if (smoothed := f"{module}.pre_quant_scale") in self._entries:
                    expected[smoothed] = (k,), tuple(DTYPES)
        if kind.kv:
            for i in range(self.text.num_hidden_layers):
                for part in "kv":
                    expected[f"language_model.layers.{i}.self_attn.{part}_proj.{part}_scale"] = (), float32
        return expected


def read_header(path: Path) -> dict[str, _Entry]:
    """Tensors of one safetensors file, after checking that the header is true to the file.

    Raises
    ------
    UnsupportedCheckpoint
        The header is longer than the file, not JSON, or its tensors overlap, leave holes, or pass the end.
    """

    def damaged(what: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(f"{path} is not a sound safetensors file: {what}; download it again")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                allowed = max(0, min(size - 8, MAX_HEADER_BYTES))
                raise damaged(f"header length {length} bytes, at most {allowed} possible")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise UnsupportedCheckpoint(f"{path} does not exist; the checkpoint is incomplete: download it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(f"header unreadable ({error})") from None
    if not isinstance(header, dict):
        raise damaged("header is not an object")
    header.pop("__metadata__", None)
    entries = {}
    for name, item in header.items():
        try:
            dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise damaged(f"entry of {name!r} lacks dtype, shape or data_offsets") from None
        numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
        if not all(type(n) is int and n >= 0 for n in numbers) or str(dtype) not in _ITEM_BITS:
            raise damaged(f"entry of {name!r} has dtype {dtype!r}, shape {shape!r}, data_offsets {[begin, end]}")
        if math.prod(shape) * _ITEM_BITS[dtype] != 8 * (end - begin):
            raise damaged(f"{name!r} of {dtype} {shape} is given {end - begin} bytes")
        entries[name] = _Entry(path, dtype, tuple(shape), 8 + length + begin, end - begin)
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            raise damaged(f"{name!r} starts at byte {entry.offset}, its predecessor ends at {position}")
        position += entry.nbytes
    if position != size:
        raise damaged(f"its tensors end at byte {position}, the file at {size}")
    return entries


def _refuse_other_architectures(config: dict) -> None:
    architectures = config.get("architectures") or []
    found = architectures[0] if architectures else config.get("model_type")
    if ARCHITECTURE not in architectures and not (not architectures and config.get("model_type") == "qwen2_5_vl"):
        raise UnsupportedCheckpoint(
            f"the checkpoint is a {found}; only {ARCHITECTURE} (NV-Reason-CXR-3B, CheXOne) is exported"
        )


def _pick(cls, values: dict, **overrides):
    """`cls` from a config's known, non-null keys, each of its default's type."""
    chosen = {}
    for field in dataclasses.fields(cls):
        value = overrides.get(field.name, values.get(field.name))
        if value is None:
            continue
        kind = type(field.default)
        try:
            value = tuple(int(v) for v in value) if kind is tuple else kind(value)
        except (TypeError, ValueError):
            raise UnsupportedCheckpoint(f"config.json has {field.name} = {value!r}, not a {kind.__name__}") from None
        if kind is int and value < 1:
            raise UnsupportedCheckpoint(f"config.json has {field.name} = {value}, at least 1 is needed")
        chosen[field.name] = value
    return cls(**chosen)


def read_config(config: dict) -> tuple[TextConfig, VisionConfig]:
    """Geometry from `config.json`, flat or nested; raises `UnsupportedCheckpoint` where it cannot be exported."""
    return _text_config(config), _vision_config(config)


def _text_config(config: dict) -> TextConfig:
    values = config.get("text_config") or config  # a flat config keeps the text keys at its top
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    text = _pick(
        TextConfig,
        values,
        rope_theta=rope.get("rope_theta", values.get("rope_theta")),
        mrope_section=rope.get("mrope_section"),
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise UnsupportedCheckpoint(f"config.json has rope type {kind!r}; only default (mrope) is exported")
    if text.hidden_act != "silu" or text.use_sliding_window:
        raise UnsupportedCheckpoint(
            f"config.json has hidden_act {text.hidden_act!r}, use_sliding_window {text.use_sliding_window}; "
            "only 'silu' and false are exported"
        )
    if text.hidden_size % text.num_attention_heads or text.num_attention_heads % text.num_key_value_heads:
        raise UnsupportedCheckpoint(
            f"config.json has hidden_size {text.hidden_size}, {text.num_attention_heads} heads and "
            f"{text.num_key_value_heads} KV heads; each has to be a multiple of the next"
        )
    if 2 * sum(text.mrope_section) != text.head_dim or len(text.mrope_section) != 3:
        raise UnsupportedCheckpoint(
            f"config.json has mrope_section {list(text.mrope_section)}; three numbers with sum {text.head_dim // 2} "
            "(half the head size) are needed"
        )
    return text


def _vision_config(config: dict) -> VisionConfig:
    values = config.get("vision_config") or {}
    values = {"in_channels": values.get("in_chans"), **values}
    vision = _pick(VisionConfig, values, rope_theta=(values.get("rope_parameters") or {}).get("rope_theta"))
    fixed = {
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "hidden_act": "silu",
    }
    for name, value in fixed.items():
        if getattr(vision, name) != value:
            raise UnsupportedCheckpoint(f"vision_config has {name} {getattr(vision, name)!r}; {value!r} is exported")
    if vision.hidden_size % (4 * vision.num_heads):
        raise UnsupportedCheckpoint(
            f"vision_config has hidden_size {vision.hidden_size} over {vision.num_heads} heads; "
            "the head size has to be a multiple of 4 (row and column rotary halves)"
        )
    return vision


def tensor_shapes(text: TextConfig, vision: VisionConfig, tied: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor that the graphs use, with the shape that the config calls for."""
    hidden, kv = text.hidden_size, text.num_key_value_heads * text.head_dim
    shapes = {"language_model.embed_tokens.weight": (text.vocab_size, hidden), "language_model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (text.vocab_size, hidden)
    for i in range(text.num_hidden_layers):
        layer = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (text.intermediate_size, hidden),
            "mlp.up_proj.weight": (text.intermediate_size, hidden),
            "mlp.down_proj.weight": (hidden, text.intermediate_size),
        }
        shapes.update({f"language_model.layers.{i}.{name}": shape for name, shape in layer.items()})
    width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    shapes["visual.patch_embed.proj.weight"] = (
        width,
        vision.in_channels,
        vision.temporal_patch_size,
        vision.patch_size,
        vision.patch_size,
    )
    for i in range(vision.depth):
        block = {
            "norm1.weight": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
        }
        for name, (rows, cols) in {
            "gate_proj": (vision.intermediate_size, width),
            "up_proj": (vision.intermediate_size, width),
            "down_proj": (width, vision.intermediate_size),
        }.items():
            block |= {f"mlp.{name}.weight": (rows, cols), f"mlp.{name}.bias": (rows,)}
        shapes.update({f"visual.blocks.{i}.{name}": shape for name, shape in block.items()})
    return shapes | {
        "visual.merger.ln_q.weight": (width,),
        "visual.merger.mlp.0.weight": (merged, merged),
        "visual.merger.mlp.0.bias": (merged,),
        "visual.merger.mlp.2.weight": (vision.out_hidden_size, merged),
        "visual.merger.mlp.2.bias": (vision.out_hidden_size,),
    }


def hub_id(source: str) -> str | None:
    """Hub repository of a checkpoint: the id itself, or the one whose snapshot in the hub's cache a folder is."""
    if not Path(source).is_dir():
        return source
    names = [part for part in Path(source).resolve().parts if part.startswith("models--")]
    return names[-1].removeprefix("models--").replace("--", "/") if names else None


def locate(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Folder of a checkpoint, downloaded when `source` is a hub id.

    Parameters
    ----------
    source : str
        An existing folder, or `ORG/NAME` on the Hugging Face hub.
    revision : str, optional
        Branch, tag or commit of a hub id.

    Returns
    -------
    folder : Path
    revision : str or None
        The commit that a hub id resolved to; None for a plain folder.

    Raises
    ------
    UnsupportedCheckpoint
        Neither a folder nor a hub id, or the hub does not give it.
    """
    if Path(source).is_dir():
        return Path(source), None
    if not _HUB_ID.fullmatch(source):
        raise UnsupportedCheckpoint(f"{source!r} is neither a folder nor a hub id ORG/NAME; check the spelling")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedCheckpoint(
            f"the hub does not give {source} at revision {revision or 'main'}: {reason}; check id, revision, network "
            "and access (`hf auth login`), or give a local folder"
        ) from None
    return folder, folder.name  # a snapshot's folder is named after its commit
