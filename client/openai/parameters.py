"""Which parameters of chat completions are taken: one table, out of which come checks, OpenAPI and documents.

A parameter that is null counts as left out. What is not in the table is refused with the nearest name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

TAKEN, IGNORED, REFUSED = "taken", "ignored", "refused"
_TEXT, _BOOLEAN = {"type": "string"}, {"type": "boolean"}


class Parameter(NamedTuple):
    """How one parameter is handled.

    Attributes
    ----------
    handling : str
        `TAKEN`; `IGNORED`: any value, without effect; `REFUSED`: only those of `neutral`, which ask for nothing.
    schema : dict
        JSON schema of the values that are taken.
    note : str
        What it does, or what to do instead.
    key : str, optional
        Of the REQUEST that takes its value as it is.
    """

    handling: str
    schema: dict[str, Any]
    note: str
    key: str | None = None
    neutral: tuple[Any, ...] = ()


def _refused(note: str, *neutral: Any) -> Parameter:
    return Parameter(REFUSED, {"enum": list(neutral)}, note, neutral=neutral)


def _ignored(note: str) -> Parameter:
    return Parameter(IGNORED, {}, note)


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_SCHEMA = _object(schema={"type": "object"})
_NO_TOOLS = "the models call no tools"
_TOKENS = {"type": "integer", "minimum": 1}

PARAMETERS: dict[str, Parameter] = {
    "model": Parameter(TAKEN, _TEXT, "the name that /v1/models gives"),
    "messages": Parameter(
        TAKEN, {"$ref": "#/components/schemas/Messages"}, "one conversation about one patient's pictures"
    ),
    "stream": Parameter(TAKEN, _BOOLEAN, "server-sent events, the last one [DONE]"),
    "stream_options": Parameter(
        TAKEN,
        {"type": "object", "properties": {"include_usage": _BOOLEAN, "include_obfuscation": _BOOLEAN}},
        "include_usage: a last chunk with the usage; include_obfuscation is ignored",
    ),
    "max_completion_tokens": Parameter(TAKEN, _TOKENS, "longest answer, reasoning included", "max_new_tokens"),
    "max_tokens": Parameter(TAKEN, _TOKENS, "the older name of max_completion_tokens", "max_new_tokens"),
    "temperature": Parameter(
        TAKEN, {"type": "number", "minimum": 0, "maximum": 2}, "the profile's if left out, mostly 0", "temperature"
    ),
    "top_p": Parameter(TAKEN, {"type": "number", "minimum": 0.001, "maximum": 1}, "the profile's if left out", "top_p"),
    "seed": Parameter(
        TAKEN, {"type": "integer", "minimum": 0}, "makes an answer with a temperature repeatable", "seed"
    ),
    "stop": Parameter(
        TAKEN,
        {"oneOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 8}]},
        "up to 8 texts; the answer, reasoning included, ends before the first of them",
    ),
    "logprobs": Parameter(
        TAKEN, _BOOLEAN, "of each token, those of reasoning and tags too; in a stream with its last chunk", "logprobs"
    ),
    "response_format": Parameter(
        TAKEN,
        {"oneOf": [_object(type={"const": "text"}), _object(type={"const": "json_schema"}, json_schema=_SCHEMA)]},
        "json_schema holds the answer to the schema while it is written, after free reasoning; text asks for nothing",
    ),
    "guide": Parameter(TAKEN, {"enum": ["none", "answer"]}, "answer holds an answer to its grammar", "guide"),
    "scores": Parameter(TAKEN, _BOOLEAN, "how sure the model is of each label, in the reading", "scores"),
    # Of this server, as the client's extra_body.
    "task": Parameter(TAKEN, _TEXT, "a task of the profile, in place of a text in the last message", "task"),
    "mode": Parameter(TAKEN, _TEXT, "how to answer, a mode of the profile", "mode"),
    "variables": Parameter(TAKEN, {"type": "object"}, "values of the placeholders of the task's prompt", "variables"),
    "identifiers": Parameter(
        TAKEN, {"enum": ["plain", "hashed"]}, "hashed keeps UIDs out of the reading", "identifiers"
    ),
    "repetition_penalty": Parameter(
        TAKEN, {"type": "number", "minimum": 0.5, "maximum": 2}, "the checkpoint's if left out", "repetition_penalty"
    ),
    "metadata": _ignored("kept nowhere"),
    "parallel_tool_calls": _ignored(_NO_TOOLS),
    "prompt_cache_key": _ignored("prompts that begin alike share what is computed without it"),
    "prompt_cache_options": _ignored("as prompt_cache_key"),
    "prompt_cache_retention": _ignored("as prompt_cache_key"),
    "safety_identifier": _ignored("kept nowhere"),
    "user": _ignored("kept nowhere"),
    "audio": _refused("the models answer in text"),
    "frequency_penalty": _refused("use repetition_penalty", 0),
    "function_call": _refused(_NO_TOOLS, "none"),
    "functions": _refused(_NO_TOOLS, []),
    "logit_bias": _refused("use response_format", {}),
    "modalities": _refused("the models answer in text", ["text"]),
    "moderation": _refused("nothing moderates an answer"),
    "n": _refused("ask again, with another seed", 1),
    "prediction": _refused("the server drafts by itself"),
    "presence_penalty": _refused("use repetition_penalty", 0),
    "reasoning_effort": _refused("use mode"),
    "service_tier": _refused("there is one", "auto", "default"),
    "store": _refused("nothing is kept", False),
    "tool_choice": _refused(_NO_TOOLS, "none", "auto"),
    "tools": _refused(_NO_TOOLS, []),
    "top_logprobs": _refused("logprobs gives the token's own", 0),
    "verbosity": _refused("use task or mode", "medium"),
    "web_search_options": _refused("nothing is looked up"),
    # Of other servers, whose benchmarks may send them.
    "ignore_eos": _refused("an answer ends where the model ends it", False),
    "min_tokens": _refused("an answer ends where the model ends it", 0),
    "top_k": _refused("use top_p", 0, -1),
}


def neutral(name: str) -> tuple[Any, ...] | None:
    """The values of a parameter that ask for nothing, where it is refused otherwise; else None."""
    parameter = PARAMETERS[name]
    return parameter.neutral if parameter.handling == REFUSED else None
