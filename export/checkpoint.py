"""Read a Qwen2.5-VL checkpoint folder without torch: configs in every spelling, tensors by memory map.

Takes a folder, plain or quantized by nvidia-modelopt (unified Hugging Face layout); gives the geometry, the token ids
and numpy views of the tensors.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from cxr_triton.errors import UnsupportedCheckpoint
from cxr_triton.export.geometry import is_tied, read_config, refuse_other_architectures, tensor_shapes
from cxr_triton.export.safetensors import Entry, read_header
from cxr_triton.profile import eos_token_ids

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
QUANT_CONFIG = "hf_quant_config.json"
CALIBRATION = "calibration.json"  # what `cxr-triton quantize` leaves beside the weights
SCHEMES = {"FP8": "fp8", "W4A16_AWQ": "int4-awq"}  # modelopt's quant_algo, and our name
GROUP_SIZES = (32, 64, 128)  # block sizes of int4 that all engines take
FILES = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer.json", "chat_template.*", CALIBRATION)
"""What an export reads, and nothing else: no pickles, no code."""

_Expected = tuple[tuple[int, ...], tuple[str, ...]]  # shape, and the types that it may be stored in
_STORED = DTYPES | {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "U8": np.dtype(np.uint8)}


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
        """Whether a module is left as it was, by its name in the file."""
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
        """Of the values, without scales."""
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
        """Of the values, without scales."""
        return self.packed.nbytes


def torch_model(folder: str | Path, dtype: object):
    """The model in transformers, from the safetensors of a folder and with code of transformers alone.

    A ``config.json`` may ask for an attention kernel of the hub, which transformers would fetch and run.

    Parameters
    ----------
    folder : path
        One that `Checkpoint` takes.
    dtype : torch.dtype or "auto"

    Returns
    -------
    Qwen2_5_VLForConditionalGeneration
        In evaluation mode, on the CPU.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    ).eval()


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
        self._refuse_other_weights(config)
        refuse_other_architectures(config)
        self.text, self.vision = read_config(config)
        self.tied = is_tied(config)
        self.image_token_id: int = config.get("image_token_id") or 151655
        self.vision_start_token_id: int = config.get("vision_start_token_id") or 151652
        self.generation = self._json_if_there("generation_config.json")
        self.eos_token_ids = eos_token_ids(self.generation, config)
        self.preprocessor = self._preprocessor()
        self.quantization = self._quantization(config)
        self.calibration = self._json_if_there(CALIBRATION) if self.quantization else {}
        self._entries, self._file_names = self._canonical(self._read_headers())
        self._check_tensors()

    def _refuse_other_weights(self, config: dict) -> None:
        """Refuse what makes transformers take weights that are not those of this folder."""
        if (self.folder / "adapter_config.json").exists():
            raise UnsupportedCheckpoint(
                f"{self.folder} has an adapter_config.json (adapters are not read here); move the adapter into a "
                "folder of its own and give that with --adapter, or export merged weights without it"
            )
        if config.get("transformers_weights") is not None:
            raise UnsupportedCheckpoint("config.json names its weights itself (transformers_weights); remove the key")

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
        """Type in which a tensor is stored."""
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
        tokenizer = self._json_if_there("tokenizer.json")
        model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        ids = dict(vocab) if isinstance(vocab, dict) else {}
        tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        return ids | {str(token.get("content")): token.get("id") for token in tokens}

    def _chat_template(self) -> str:
        path = self.folder / "chat_template.jinja"
        if path.exists():
            return path.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = self._json_if_there(name).get("chat_template")
            if isinstance(template, str):
                return template
        raise UnsupportedCheckpoint(
            f"{self.folder} has no chat template (chat_template.jinja, chat_template.json or tokenizer_config.json); "
            "copy it from the checkpoint's source"
        )

    @property
    def weight_files(self) -> set[Path]:
        """Files that hold its tensors."""
        return {entry.path for entry in self._entries.values()}

    def digests(self) -> dict[str, str]:
        """sha256 of every file that this checkpoint is read from, by file name."""
        names = {path.name for path in self.weight_files}
        names |= {path.name for pattern in FILES for path in self.folder.glob(pattern)}
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

    def _json_if_there(self, name: str) -> dict:
        return self._json(name) if (self.folder / name).exists() else {}

    def _preprocessor(self) -> dict:
        if (self.folder / "preprocessor_config.json").exists():
            return self._json("preprocessor_config.json")
        processor = self._json_if_there("processor_config.json").get("image_processor")
        if not isinstance(processor, dict):
            raise UnsupportedCheckpoint(
                f"{self.folder} has no preprocessor_config.json (mean, std and pixel limits of the images); "
                "copy it from the checkpoint's source"
            )
        return processor

    def _read_headers(self) -> dict[str, Entry]:
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
        if not isinstance(values, dict) or not isinstance(producer, dict):
            raise UnsupportedCheckpoint(f"{path} has no object named quantization; quantize again")
        algorithm, kv, group = (values.get(key) for key in ("quant_algo", "kv_cache_quant_algo", "group_size"))
        if not isinstance(algorithm, str) or algorithm not in SCHEMES:
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

    def _canonical(self, entries: dict[str, Entry]) -> tuple[dict[str, Entry], dict[str, str]]:
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
        expected: dict[str, _Expected] = {
            name: (shape, tuple(DTYPES)) for name, shape in tensor_shapes(self.text, self.vision, self.tied).items()
        }
        if self.quantization:
            expected = self._quantized(expected, self.quantization)
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

    def _quantized(self, plain: dict[str, _Expected], kind: Quantization) -> dict[str, _Expected]:
        """The tensors that a quantized checkpoint has in place of the plain ones."""
        float32 = ("F32",)
        expected: dict[str, _Expected] = {}
        for name, (shape, dtypes) in plain.items():
            module = name.removesuffix(".weight")
            file_module = self._file_names.get(name, name).removesuffix(".weight")
            is_layer = name.startswith("language_model.layers.") and name.endswith("_proj.weight")
            if not is_layer or kind.excludes(file_module) or kind.excludes(module):
                expected[name] = shape, dtypes
                continue
            if kind.group_size is None:
                expected[name] = shape, ("F8_E4M3",)
                expected[f"{module}.weight_scale"] = expected[f"{module}.input_scale"] = (), float32
            else:
                n, k = shape
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
