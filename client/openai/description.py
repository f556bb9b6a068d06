"""The server's OpenAPI description, out of the table of parameters."""

from __future__ import annotations

from typing import Any

from cxr_triton import __version__
from cxr_triton.client.openai.chat import IMAGE_TYPES
from cxr_triton.client.openai.parameters import IGNORED, PARAMETERS, REFUSED
from cxr_triton.reading import NOT_FOR_DIAGNOSIS

_TEXT = {"type": "string"}
_NULLABLE = {"type": ["string", "null"]}
_COUNT = {"type": "integer", "minimum": 0}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(of: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": of, **more}


def _request() -> dict[str, Any]:
    properties = {}
    for name, parameter in PARAMETERS.items():
        schema = parameter.schema
        said = {IGNORED: "Ignored", REFUSED: "Unsupported"}.get(parameter.handling)
        nullable = schema if not schema else {"anyOf": [schema, {"type": "null"}]}
        properties[name] = {**nullable, "description": f"{said}: {parameter.note}" if said else parameter.note}
    return {**_object("model messages", **properties), "additionalProperties": False}


def _messages() -> dict[str, Any]:
    url = {
        "type": "string",
        "pattern": f"^data:({'|'.join(IMAGE_TYPES)});base64,",
        "description": "a data URI, no address",
    }
    image = _object("type image_url", type={"const": "image_url"}, image_url=_object("url", url=url))
    part = {"oneOf": [_object("type text", type={"const": "text"}, text=_TEXT), image]}
    content = {"anyOf": [_TEXT, _list(part), {"type": "null"}]}
    user = _object("role", role={"const": "user"}, content=content)
    assistant = _object("role", role={"const": "assistant"}, content=content, reasoning_content=_NULLABLE)
    return _list({"oneOf": [user, assistant]}, minItems=1)


def _usage() -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return _object(" ".join(names), **dict.fromkeys(names, _COUNT), prompt_tokens_details={"type": "object"})


def _completion(kind: str, choice: dict[str, Any], required: str) -> dict[str, Any]:
    return _object(
        f"id object created model choices {required}".strip(),
        id=_TEXT,
        object={"const": kind},
        created=_COUNT,
        model=_TEXT,
        choices=_list(choice),
        usage={"anyOf": [_ref("Usage"), {"type": "null"}]},
        cxr=_ref("Extension"),
    )


def _schemas() -> dict[str, Any]:
    reason = {"enum": ["stop", "length", None]}
    message = _object("role content", role={"const": "assistant"}, content=_TEXT, reasoning_content=_NULLABLE)
    delta = {"type": "object", "properties": {"role": _TEXT, "content": _TEXT, "reasoning_content": _TEXT}}
    choice = {"index": _COUNT, "finish_reason": reason, "logprobs": {}}
    model = _object("id object created owned_by", id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT)
    error = _object("message type code param", message=_TEXT, type=_TEXT, code=_TEXT, param=_NULLABLE)
    return {
        "Request": _request(),
        "Messages": _messages(),
        "Usage": _usage(),
        "Extension": _object(
            "notice reading",
            notice={"const": NOT_FOR_DIAGNOSIS},
            reading={"type": "object", "description": "docs/reading.schema.json"},
        ),
        "Completion": _completion(
            "chat.completion", _object("index message finish_reason", message=message, **choice), "usage cxr"
        ),
        "Chunk": _completion("chat.completion.chunk", _object("index delta finish_reason", delta=delta, **choice), ""),
        "Model": model,
        "Models": _object("object data", object={"const": "list"}, data=_list(_ref("Model"))),
        "Error": _object("error", error=error),
    }


def _answers(schema: dict[str, Any], kind: str = "application/json", **others: dict[str, Any]) -> dict[str, Any]:
    def body(schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
        return {"content": {kind: {"schema": schema}}}

    said = "Whatever fails: `code` is one of docs/reference/errors.md, `param` the parameter that is at fault."
    good = {"description": "As asked.", "content": body(schema, kind)["content"]}
    for other, other_schema in others.items():
        good["content"] |= body(other_schema, other.replace("__", "/").replace("_", "-"))["content"]
    return {"200": good, "default": {"description": said, **body(_ref("Error"))}}


def description() -> dict[str, Any]:
    """OpenAPI 3.1 of all that the server answers."""
    ask = {
        "summary": "A reading of one patient's chest radiographs, whole or as server-sent events.",
        "parameters": [{"name": "traceparent", "in": "header", "description": "W3C Trace Context.", "schema": _TEXT}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("Request")}}},
        "responses": _answers(_ref("Completion"), text__event_stream=_ref("Chunk")),
    }
    name = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
    healthy = _answers(_object("status", status={"const": "ok"}))
    paths = {
        "/v1/chat/completions": {"post": ask},
        "/v1/models": {"get": {"summary": "What is served.", "responses": _answers(_ref("Models"))}},
        "/v1/models/{name}": {
            "get": {"summary": "One of it.", "parameters": [name], "responses": _answers(_ref("Model"))}
        },
        "/health": {"get": {"summary": "Whether readings can be made.", "security": [], "responses": healthy}},
        "/metrics": {"get": {"summary": "For Prometheus.", "responses": _answers(_TEXT, "text/plain")}},
        "/openapi.json": {"get": {"summary": "This.", "security": [], "responses": _answers({"type": "object"})}},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cxr-triton",
            "version": __version__,
            "description": f"{NOT_FOR_DIAGNOSIS} OpenAI's chat completions in front of a served chest X-ray reader.",
        },
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }
