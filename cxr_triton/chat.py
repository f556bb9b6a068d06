"""Chat messages → token ids and M-RoPE positions by the checkpoint's own template and tokenizer, and ids → text.

Control tokens come from the template alone: text that spells one (``<|im_end|>``) stays text.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.errors import InternalError, InvalidRequest, UnsupportedCheckpoint
from cxr_triton.template import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_FILE_BYTES = 64 << 20
"""Of each of the files that are read; the published vocabulary takes 7 MB."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's regular expression, whose time grows with the text; of a stranger's, nobody knows."""
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "normalizer": {"NFC": ()},
    "pre_tokenizer": {"ByteLevel": (), "Split": ("pattern",)},
    "post_processor": {"ByteLevel": (), "TemplateProcessing": ()},
    "decoder": {"ByteLevel": ()},
    "model": {"BPE": ("dropout",)},
}
"""What a tokenizer may consist of, and the settings of it that are looked at."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the decoder takes it.

    Attributes
    ----------
    input_ids : ndarray
        int64 [S]; every image is a run of image tokens.
    position_ids : ndarray
        int64 [3, S]: time, height, width, as transformers' ``Qwen2_5_VLModel.get_rope_index`` gives for stills.
    delta : int
        Position of a generated token minus its index in the sequence.
    image_spans : tuple of (int, int)
        First token and number of tokens of each image.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    delta: int
    image_spans: tuple[tuple[int, int], ...]

    def image_index(self, token_budget: int) -> np.ndarray:
        """Row of the image embeddings for every token, -1 for text: int64 [S].

        Image ``i`` owns the rows from ``i * token_budget``, whatever its own number of tokens.
        """
        index = np.full(self.input_ids.shape, -1, np.int64)
        for i, (start, count) in enumerate(self.image_spans):
            if count > token_budget:
                raise InternalError(f"image {i} has {count} tokens, the engine's budget is {token_budget}")
            index[start : start + count] = np.arange(i * token_budget, i * token_budget + count)
        return index


class ChatTokenizer:
    """Tokenizer and chat template of a checkpoint or bundle folder.

    Parameters
    ----------
    folder : str or Path
        Holds ``tokenizer.json``, ``config.json`` and a chat template (``chat_template.jinja``, ``chat_template.json``
        or in ``tokenizer_config.json``); ``preprocessor_config.json`` may give the merge size.

    Raises
    ------
    UnsupportedCheckpoint
        A file is missing or unreadable, the tokenizer is not byte-level BPE as Qwen2 has it with the image tokens
        marked special, or the chat template does not compile.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        config = _json(folder / "config.json")
        self._tokenizer = _tokenizer(folder / "tokenizer.json")
        # From here on the tokenizer takes special tokens for text; `_ids` finds those of the template itself.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special and token.content}
        self._special_ids = frozenset(self._special.values())
        for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if key == "image_token_id" or config.get(key) is not None:
                self._check_special(key, config.get(key), added)
        self.image_token_id: int = config["image_token_id"]
        alternatives = "|".join(re.escape(token) for token in sorted(self._special, key=len, reverse=True))
        self._split = re.compile(f"({alternatives})")
        self._starts = re.compile(f"(?={alternatives})(.)", re.DOTALL)
        self.merge_size = _merge_size(folder, config)
        self._template = ChatTemplate(_chat_template(folder))

    def _check_special(self, key: str, token_id: object, added: dict) -> None:
        if type(token_id) is not int or token_id not in added:
            raise UnsupportedCheckpoint(
                f"config.json: {key} is {token_id!r:.40}, which tokenizer.json does not add; fix one"
            )
        if token_id not in self._special_ids:
            content = added[token_id].content
            raise UnsupportedCheckpoint(f"tokenizer.json: token {content!r} ({key}) is not marked special")

    def encode(self, messages: list[dict], grids: Sequence[tuple[int, int]] = ()) -> Prompt:
        """Token ids and positions of a chat, up to where the assistant's answer begins.

        Parameters
        ----------
        messages : list of dict
            ``role`` and ``content``: a text, or a list of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``.
        grids : sequence of (rows, columns)
            Patches of each image, in the order of the images in `messages`.

        Raises
        ------
        InvalidRequest
            The chat template refuses the messages, or shows another number of images than `grids` has.
        UnsupportedCheckpoint
            The chat template fails or goes beyond its limits, see `cxr_triton.template`.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        merged = [(rows // self.merge_size, columns // self.merge_size) for rows, columns in grids]
        for token in self._ids(messages):
            if token != self.image_token_id:
                ids.append(token)
                continue
            if len(spans) < len(merged):
                rows, columns = merged[len(spans)]
                spans.append((len(ids), rows * columns))
                ids.extend([token] * (rows * columns))
            else:
                spans.append((len(ids), 0))
        if len(spans) != len(merged):
            raise InvalidRequest(f"messages: {len(spans)} images, {len(merged)} grids given; they have to agree")
        positions, delta = _positions(len(ids), spans, merged)
        return Prompt(np.array(ids, np.int64), positions, delta, tuple(spans))

    def _ids(self, messages: list[dict]) -> list[int]:
        """Token ids of the rendered template, each image one image token."""
        # A mark behind the first character keeps a special token spelled in a text from being found after rendering.
        used = {character for text in _texts(messages) for character in text}
        mark = next(c for c in map(chr, range(0xF0000, 0x110000)) if c not in used)
        marked = _map_texts(messages, lambda text: self._starts.sub(lambda match: match[1] + mark, text))
        ids = []
        for part in self._split.split(self._template.render(marked)):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self.text_ids(part.replace(mark, "")))
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text by itself; what spells a special token in it stays text."""
        with _naming_panics():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def stream(self) -> TokenStream:
        """A new incremental detokenizer."""
        return TokenStream(self._token_bytes)

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special_ids:
            return b""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # padding rows of the embedding table
            return b""
        table = _byte_of_character()
        try:
            return bytes([table[character] for character in token])
        except KeyError:  # an added token that is not written in the byte alphabet
            return token.encode()


class TokenStream:
    """Token ids → text as it comes; a character is given once all its bytes are there.

    The deltas add up to the tokenizer's decoding of all ids without special tokens.
    """

    def __init__(self, token_bytes):
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Text that `ids` complete."""
        return self._decoder.decode(b"".join(self._token_bytes(int(i)) for i in ids))

    @property
    def is_whole(self) -> bool:
        """Whether no character has begun and not ended."""
        return not self._decoder.getstate()[0]

    def finish(self) -> str:
        """What is left: a replacement character where the last character is incomplete."""
        return self._decoder.decode(b"", final=True)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, the other bytes for 256 and up (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _positions(length: int, spans: list[tuple[int, int]], merged: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """M-RoPE positions [3, length] and delta: text counts on, an image spans its grid from where the text stopped."""
    positions = np.empty((3, length), np.int64)
    index = position = 0
    for (start, count), (rows, columns) in zip(spans, merged, strict=True):
        positions[:, index:start] = np.arange(position, position + start - index)
        position += start - index
        positions[0, start : start + count] = position
        positions[1, start : start + count] = position + np.repeat(np.arange(rows), columns)
        positions[2, start : start + count] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
        index = start + count
    positions[:, index:] = np.arange(position, position + length - index)
    return positions, position - index


def _texts(messages: list[dict]) -> Iterable[str]:
    for message in messages:
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (item["text"] for item in message["content"] if item["type"] == "text")


def _map_texts(messages: list[dict], change) -> list[dict]:
    def content(value):
        if isinstance(value, str):
            return change(value)
        return [{**item, "text": change(item["text"])} if item["type"] == "text" else dict(item) for item in value]

    return [{**message, "content": content(message["content"])} for message in messages]


def _text(path: Path) -> str:
    """A file's text; raises `UnsupportedCheckpoint` where it has none or is too large."""
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise UnsupportedCheckpoint(f"{path.name}: has {size} bytes, allowed {MAX_FILE_BYTES}; restore the file")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedCheckpoint(f"{path.name}: cannot be read: {error}; restore the file") from None


def _json(path: Path) -> dict:
    return _parsed(_text(path), path.name)


def _parsed(text: str, name: str) -> dict:
    def once(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):  # two readers could take two different ones
            raise ValueError("a key is given twice")
        return found

    try:
        data = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(f"{name}: cannot be read as JSON: {error}; restore the file") from None
    if not isinstance(data, dict):
        raise UnsupportedCheckpoint(f"{name}: is a JSON {type(data).__name__}, expected an object")
    return data


def _tokenizer(path: Path) -> Tokenizer:
    """The tokenizer, once every part of it is known to end in a time that grows with the text alone."""
    from tokenizers import Tokenizer

    text = _text(path)
    whole = _parsed(text, path.name)
    for part in _PARTS:
        _check_part(part, whole.get(part))
    try:
        with _naming_panics():
            tokenizer = Tokenizer.from_str(text)
    except UnsupportedCheckpoint:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UnsupportedCheckpoint(f"tokenizer.json: cannot be read: {error}; restore the file") from None
    if tokenizer.decoder is None:
        raise UnsupportedCheckpoint("tokenizer.json: has no decoder, supported is ByteLevel")
    # Of a training run: a prompt is neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_part(part: str, found: object) -> None:
    """Refuse what a tokenizer of Qwen2 does not have."""
    if found is None:
        return
    kind = found.get("type") if isinstance(found, dict) else found
    if isinstance(found, dict) and kind == "Sequence":
        lists = [value for value in found.values() if isinstance(value, list)]
        for item in itertools.chain(*lists):
            _check_part(part, item)
        return
    if not isinstance(found, dict) or kind not in _PARTS[part]:
        raise UnsupportedCheckpoint(
            f"tokenizer.json: its {part} is {kind!r:.40}, supported is {' or '.join(_PARTS[part])}"
        )
    if "pattern" in _PARTS[part][kind] and found.get("pattern") != {"Regex": _WORDS}:
        raise UnsupportedCheckpoint(
            f"tokenizer.json: splits at {found.get('pattern')!r:.80}, supported is the regular expression of Qwen2; "
            "any other may take for ever"
        )
    if "dropout" in _PARTS[part][kind] and found.get("dropout"):
        raise UnsupportedCheckpoint("tokenizer.json: drops merges by chance (dropout); set it to null")


@contextlib.contextmanager
def _naming_panics() -> Iterator[None]:
    """A panic of the tokenizers library, which is no `Exception`, or text that is none, as `UnsupportedCheckpoint`."""
    try:
        yield
    except TypeError:  # so the library refuses half a surrogate pair
        raise UnsupportedCheckpoint("chat template: gives text that is not Unicode; restore the file") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UnsupportedCheckpoint(f"tokenizer.json: its tokenizer fails: {error!s:.200}; restore the file") from None


def _merge_size(folder: Path, config: dict) -> int:
    preprocessor, vision = folder / "preprocessor_config.json", config.get("vision_config")
    found = _json(preprocessor).get("merge_size") if preprocessor.is_file() else None
    found = found or (vision.get("spatial_merge_size") if isinstance(vision, dict) else None) or 2
    if type(found) is not int or not 1 <= found <= 16:
        raise UnsupportedCheckpoint(f"merge size of image patches is {found!r:.40}, expected 1 to 16; restore the file")
    return found


def _chat_template(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return _text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(template, list):  # several named templates
            named = (item for item in template if isinstance(item, dict) and item.get("name") == "default")
            template = next(named, {}).get("template")
        if isinstance(template, str):
            return template
    raise UnsupportedCheckpoint("no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json")
