"""A body of ``/v1/chat/completions`` → what is asked of the served reader: REQUEST and images."""

from __future__ import annotations

import binascii
import json
import re
from dataclasses import dataclass
from typing import Any

from cxr_triton.client.openai.parameters import PARAMETERS, neutral
from cxr_triton.client.openai.refusal import Refusal
from cxr_triton.errors import InvalidImage, InvalidRequest, unknown_key
from cxr_triton.profile import Mode, ModelProfile
from cxr_triton.request import ReadRequest

IMAGE_TYPES = ("image/png", "image/jpeg", "image/jpg", "application/dicom")
_DATA = re.compile(rf"data:(?:{'|'.join(IMAGE_TYPES)});base64", re.IGNORECASE)
_MESSAGE_KEYS = ("role", "content", "name", "reasoning_content", "cxr", "annotations")
"""Of a message; the last two are of answers that clients send back as they came. Others may be null or empty."""


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked body.

    Attributes
    ----------
    asked : dict
        Keys of the REQUEST.
    images : tuple of bytes
        Prior first, current last.
    grammar : str
        Of the answer, see `cxr_triton.split.Splitter`.
    """

    asked: dict[str, Any]
    images: tuple[bytes, ...]
    grammar: str
    stream: bool
    include_usage: bool

    @classmethod
    def from_body(cls, body: bytes | bytearray, profile: ModelProfile) -> ChatRequest:
        """What a body asks of a server of `profile`.

        Raises
        ------
        Refusal
            It is no JSON, asks for what is not there, or has a value of another type or out of its range.
        """
        try:
            data = _parsed(body)
            _check_names(data)
            if data.get("model") != profile.name:
                raise Refusal(InvalidRequest(_no_model(data.get("model"), profile)), status=404, param="model")
            stream, usage = _flag(data, "stream"), _flag(_object(data, "stream_options"), "include_usage")
            asked = _asked(data)
            turns, images = _conversation(data.get("messages"), profile, asked)
            asked |= turns
            # A schema is for whoever follows it to judge: the server, before the first text.
            known = {key: value for key, value in asked.items() if key != "guide" or isinstance(value, str)}
            checked = ReadRequest.from_json(json.dumps(known), profile)
            checked.messages(len(images))
        except (InvalidRequest, InvalidImage) as error:
            raise Refusal(error) from None
        return cls(asked=asked, images=images, grammar=checked.grammar, stream=stream, include_usage=usage)


def _parsed(body: bytes | bytearray) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):  # two readers could take two different ones
            raise ValueError("a key is given twice")
        return data

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        data = json.loads(body, object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        said = (
            f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        )
        raise InvalidRequest(f"the body is not JSON: {said}; send one JSON object in UTF-8, each key once") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body is a JSON {type(data).__name__}, expected an object")
    return {key: value for key, value in data.items() if value is not None}


def _check_names(data: dict[str, Any]) -> None:
    for name, value in data.items():
        if name not in PARAMETERS:
            raise InvalidRequest(unknown_key(name[:60], PARAMETERS, "the request"))
        allowed = neutral(name)
        if allowed is not None and not any(_is_same(value, one) for one in allowed):
            but = f" other than {' or '.join(map(json.dumps, allowed))}" if allowed else ""
            raise InvalidRequest(f"{name}: a value{but} is unsupported; {PARAMETERS[name].note}")


def _is_same(value: object, other: object) -> bool:
    """As JSON has it: True is no 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _no_model(name: object, profile: ModelProfile) -> str:
    return f"model: {name!r:.60} is not served here; ask for {profile.name!r}"


def _flag(data: dict[str, Any], name: str) -> bool:
    value = data.get(name) or False
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}: is {type(value).__name__}, expected true or false")
    return value


def _object(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name, {})
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name}: is {type(value).__name__}, expected an object")
    return value


def _asked(data: dict[str, Any]) -> dict[str, Any]:
    """REQUEST of all but the messages."""
    asked: dict[str, Any] = {}
    for name, value in data.items():
        key = PARAMETERS[name].key
        if key is None:
            continue
        if asked.get(key, value) != value:
            raise InvalidRequest(
                f"{name}: is {value!r:.24}, and the same limit has another value too; give one of both"
            )
        asked[key] = value
    if "stop" in data:
        asked["stop"] = [data["stop"]] if isinstance(data["stop"], str) else data["stop"]
    if guide := _guide(_object(data, "response_format")):
        if "guide" in asked:
            raise InvalidRequest("guide: response_format holds the answer to a schema already; drop one")
        asked["guide"] = guide
    return asked


def _guide(response_format: dict[str, Any]) -> dict[str, Any] | None:
    kind = response_format.get("type", "text")
    if kind == "text":
        return None
    named = response_format.get("json_schema")
    if kind != "json_schema" or not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise InvalidRequest('response_format: give type "text", or type "json_schema" with json_schema.schema')
    return {"json_schema": named["schema"]}


def _conversation(
    messages: object, profile: ModelProfile, asked: dict[str, Any]
) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    """``prompt`` and ``history`` of the REQUEST, and the images."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages: expected a list with at least the user's message")
    name = asked.get("mode")
    mode = profile.modes.get(name if isinstance(name, str) else "", profile.modes[profile.default_mode])
    history: list[dict[str, str]] = []
    images: tuple[bytes, ...] = ()
    text = ""
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = _role(message, where)
        text, found = _content(message.get("content"), where)
        if found and i:
            raise InvalidRequest(
                f"{where}.content: has images, which belong to the first message; begin another conversation with them"
            )
        images = images or found
        is_last = i == len(messages) - 1
        if role != ("user", "assistant")[i % 2] or (is_last and role != "user"):
            raise InvalidRequest(f"{where}.role: is {role!r}; user and assistant alternate, and the user's is the last")
        if not is_last:
            turn = _asked_before(text, profile, mode) if role == "user" else _answered(message, text, mode, where)
            history.append({"role": role, "content": turn})
    turns: dict[str, Any] = {"history": history} if history else {}
    if text.strip():
        if "task" in asked:
            raise InvalidRequest("task: the last message has a text, which is asked in place of a task; drop one")
        turns["prompt"] = text
    return turns, images


def _role(message: object, where: str) -> str:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where}: is {type(message).__name__}, expected an object with role and content")
    role = message.get("role")
    if role in ("system", "developer"):
        raise InvalidRequest(
            f"{where}.role: {role} messages are unsupported: the system prompt is the profile's, with which the model "
            "was trained; write into the user's message"
        )
    if role not in ("user", "assistant"):
        raise InvalidRequest(f"{where}.role: is {role!r:.60}, expected user or assistant")
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and value:
            raise InvalidRequest(f"{where}: {unknown_key(key[:60], _MESSAGE_KEYS, 'a message')}")
    return role


def _asked_before(text: str, profile: ModelProfile, mode: Mode) -> str:
    """An earlier turn of the user as the model got it: without a text it was the default task."""
    text = text if text.strip() else profile.tasks[profile.default_task].prompt
    return text if text.endswith(mode.suffix) else text + mode.suffix


def _answered(message: dict[str, Any], text: str, mode: Mode, where: str) -> str:
    """An earlier answer, with its reasoning where that is sent back."""
    reasoning = message.get("reasoning_content") or ""
    if not isinstance(reasoning, str):
        raise InvalidRequest(f"{where}.reasoning_content: is {type(reasoning).__name__}, expected text")
    if not reasoning or mode.grammar == "plain":
        return text
    if mode.grammar == "boxed":
        return f"{reasoning}\n\\boxed{{{text}}}"
    return f"<think>{reasoning}</think>\n<answer>{text}</answer>"


def _content(content: object, where: str) -> tuple[str, tuple[bytes, ...]]:
    """Text and images of a message."""
    if content is None or isinstance(content, str):
        return content or "", ()
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}.content: is {type(content).__name__}, expected text or a list of parts")
    texts, images = [], []
    for i, part in enumerate(content):
        inner = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            images.append(_image(part.get("image_url"), inner))
        else:
            raise InvalidRequest(
                f"{inner}: expected {{type: text, text}} or {{type: image_url, image_url: {{url}}}}, got {kind!r:.60}"
            )
    return "\n".join(texts), tuple(images)


def _image(image: object, where: str) -> bytes:
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise InvalidRequest(f"{where}.image_url.url: is {type(url).__name__}, expected a data URI")
    head, comma, encoded = url.partition(",")
    if not comma or not _DATA.fullmatch(head):
        raise InvalidRequest(
            f"{where}.image_url.url: expected data:TYPE;base64,… with one of {', '.join(IMAGE_TYPES)}; no address or "
            "path is ever fetched, send the file itself"
        )
    try:
        data = binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError:  # also of what is not ASCII
        raise InvalidImage(f"{where}.image_url.url: is not base64 to its end; encode the whole file") from None
    if not data:
        raise InvalidImage(f"{where}.image_url.url: is empty; send a file")
    return data
