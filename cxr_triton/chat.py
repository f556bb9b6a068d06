"""Chat messages → token ids and M-RoPE positions by the checkpoint's own template and tokenizer, and ids → text.

Control tokens come from the template alone: text that spells one (``<|im_end|>``) stays text.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cxr_triton.errors import InternalError, InvalidRequest, UnsupportedCheckpoint


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
        A file is missing or unreadable, or the tokenizer is not byte-level BPE with the image tokens marked special.
    """

    def __init__(self, folder: str | Path):
        from tokenizers import Tokenizer

        folder = Path(folder)
        config = _json(folder / "config.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise UnsupportedCheckpoint(f"tokenizer.json: cannot be read: {error}; restore the file") from None
        decoder = type(self._tokenizer.decoder).__name__
        if decoder != "ByteLevel":
            raise UnsupportedCheckpoint(f"tokenizer.json: its decoder is {decoder}, supported is ByteLevel")
        # From here on the tokenizer takes special tokens for text; `_ids` finds those of the template itself.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if key == "image_token_id" or config.get(key) is not None:
                self._check_special(key, config.get(key), added)
        self.image_token_id: int = config["image_token_id"]
        alternatives = "|".join(re.escape(token) for token in sorted(self._special, key=len, reverse=True))
        self._split = re.compile(f"({alternatives})")
        self._starts = re.compile(f"(?={alternatives})(.)", re.DOTALL)
        preprocessor = folder / "preprocessor_config.json"
        vision = config.get("vision_config") or {}
        merge = (_json(preprocessor) if preprocessor.is_file() else {}).get("merge_size")
        self.merge_size: int = merge or vision.get("spatial_merge_size") or 2
        self._template = _compile(_chat_template(folder))

    def _check_special(self, key: str, token_id: object, added: dict) -> None:
        if token_id in self._special_ids:
            return
        if token_id not in added:
            raise UnsupportedCheckpoint(
                f"config.json: {key} is {token_id!r}, which tokenizer.json does not add; fix one"
            )
        raise UnsupportedCheckpoint(f"tokenizer.json: token {added[token_id].content!r} ({key}) is not marked special")

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
        import jinja2

        # A mark behind the first character keeps a special token spelled in a text from being found after rendering.
        used = {character for text in _texts(messages) for character in text}
        mark = next(c for c in map(chr, range(0xF0000, 0x110000)) if c not in used)
        marked = _map_texts(messages, lambda text: self._starts.sub(lambda match: match[1] + mark, text))
        try:
            rendered = self._template.render(messages=marked, add_generation_prompt=True, tools=None, documents=None)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"messages: the chat template refuses them: {error}") from None
        ids = []
        for part in self._split.split(rendered):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._tokenizer.encode(part.replace(mark, ""), add_special_tokens=False).ids)
        return ids

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


def _json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(f"{path.name}: cannot be read as JSON: {error}; restore the file") from None
    if not isinstance(data, dict):
        raise UnsupportedCheckpoint(f"{path.name}: is a JSON {type(data).__name__}, expected an object")
    return data


def _chat_template(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(template, list):  # several named templates
            template = next((item["template"] for item in template if item.get("name") == "default"), None)
        if isinstance(template, str):
            return template
    raise UnsupportedCheckpoint("no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json")


def _compile(source: str):
    """The template, compiled as transformers compiles it."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UnsupportedCheckpoint(f"chat template: does not compile: {error}; restore the file") from None
