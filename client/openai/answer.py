"""What a reading looks like in OpenAI's API: chunks of a stream, a whole completion, models."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from cxr_triton.profile import ModelProfile
from cxr_triton.reading import NOT_FOR_DIAGNOSIS, Reading


class Answer:
    """One completion: its name, its time, and the bodies that tell of it."""

    def __init__(self, model: str, *, include_usage: bool = False):
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self._same: dict[str, Any] = {"id": self.id, "created": int(time.time()), "model": model}
        self._include_usage = include_usage

    def chunk(self, delta: dict[str, str], end: Reading | None = None) -> dict[str, Any]:
        """One event of a stream; the last one with a choice tells of the reading, which has come to its `end`."""
        choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        more = {}
        if end:
            choice |= {"logprobs": logprobs(end), "finish_reason": finish_reason(end)}
            more = {"cxr": extension(end)}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._same, "object": "chat.completion.chunk", "choices": [choice], **usage, **more}

    def last_chunks(self, reading: Reading) -> list[dict[str, Any]]:
        """The end of a stream: why it ended and the whole reading, then the usage where it was asked for."""
        chunks = [self.chunk({}, reading)]
        if self._include_usage:
            chunks.append({**self.chunk({}), "choices": [], "usage": usage(reading)})
        return chunks

    def whole(self, reading: Reading, reasoning: str, content: str) -> dict[str, Any]:
        """A completion that is not streamed."""
        message = {"role": "assistant", "content": content, "reasoning_content": reasoning or None, "refusal": None}
        ended = {"logprobs": logprobs(reading), "finish_reason": finish_reason(reading)}
        choice = {"index": 0, "message": message, **ended}
        body = {**self._same, "object": "chat.completion", "choices": [choice], "usage": usage(reading)}
        return {**body, "cxr": extension(reading)}


def finish_reason(reading: Reading) -> str:
    """``stop``, or ``length`` where the token limit came first."""
    return "stop" if reading.finish_reason == "stop" else "length"


def logprobs(reading: Reading) -> dict[str, Any] | None:
    """Of each token of the model's text, where they were asked for; the bytes of a cut-off character are its last's."""
    if not reading.token_logprobs:
        return None
    tokens, start = [], 0
    for end, logprob in zip(reading.token_ends, reading.token_logprobs, strict=False):
        token, start = reading.text[start:end], end
        tokens.append({"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []})
    return {"content": tokens, "refusal": None}


def usage(reading: Reading) -> dict[str, Any]:
    """Tokens, as OpenAI counts them."""
    prompt, completion = (reading.usage.get(f"{kind}_tokens", 0) for kind in ("prompt", "completion"))
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    counts["total_tokens"] = prompt + completion
    if "cached_tokens" in reading.usage:
        counts["prompt_tokens_details"] = {"cached_tokens": reading.usage["cached_tokens"]}
    return counts


def extension(reading: Reading) -> dict[str, Any]:
    """The field ``cxr``: what this API has no place for."""
    return {"notice": NOT_FOR_DIAGNOSIS, "reading": json.loads(reading.to_json())}


def model(profile: ModelProfile) -> dict[str, Any]:
    """An entry of ``/v1/models``."""
    tasks = {
        name: {
            "description": task.description,
            "prompt": task.prompt,
            "answer": task.answer,
            "images": [task.min_images, task.max_images],
            "variables": list(task.placeholders),
            "follow_up": task.follow_up,
        }
        for name, task in profile.tasks.items()
    }
    return {
        "id": profile.name,
        "object": "model",
        "created": 0,  # the weights do not say when
        "owned_by": profile.checkpoint_id.partition("/")[0],
        "root": profile.checkpoint_id,
        "max_model_len": profile.max_sequence,
        "cxr": {
            "notice": NOT_FOR_DIAGNOSIS,
            "title": profile.title,
            "licence": profile.licence.name,
            "terms": profile.notice,
            "max_images": profile.max_images,
            "default_task": profile.default_task,
            "tasks": tasks,
            "default_mode": profile.default_mode,
            "modes": {name: mode.description for name, mode in profile.modes.items()},
        },
    }
