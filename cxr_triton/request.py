"""The REQUEST JSON of one reading, checked against a model profile, and the chat messages it stands for.

Keys, all optional: ``task`` (a task of the profile), ``prompt`` (free text in place of the task's prompt),
``variables`` (values of the prompt's placeholders; a list becomes lettered options), ``mode``, ``history`` (earlier
turns as the model got and wrote them: ``prompt`` and ``text`` of a reading), ``max_new_tokens``, ``temperature``,
``top_p``, ``repetition_penalty``, ``seed``, ``stop``, ``identifiers`` (``plain``, or ``hashed`` for a reading that
carries digests in place of UIDs), ``guide`` (``none``; ``answer`` holds what machines read of the answer to its grammar
while it is written; ``{"json_schema": {...}}`` makes it JSON), ``logprobs`` and ``scores`` (true for a reading that
says how likely the model found each token, and how sure it is of each label or option).
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from cxr_triton.alternatives import Scoring
from cxr_triton.errors import InvalidRequest, unknown_key
from cxr_triton.guide import MODE_GUIDES, answer_grammar, schema_grammar
from cxr_triton.identity import IDENTIFIERS
from cxr_triton.profile import PLACEHOLDER, Decoding, ModelProfile, Task

MAX_REQUEST_BYTES = 256 * 1024
MAX_TEXT_CHARS = 32_768
MAX_TURNS = 32
MAX_OPTIONS = 26
MAX_STOPS = 8
MAX_STOP_CHARS = 64
MAX_SEED = 2**63 - 1

_KEYS = (
    "task",
    "prompt",
    "variables",
    "mode",
    "history",
    "max_new_tokens",
    "temperature",
    "top_p",
    "repetition_penalty",
    "seed",
    "stop",
    "identifiers",
    "guide",
    "logprobs",
    "scores",
)
_LETTERED = re.compile(r"^\([A-Z]\) (.+)$", re.MULTILINE)
_RANGES = {f.name: f.metadata["range"] for f in dataclasses.fields(Decoding)}


@dataclass(frozen=True, kw_only=True)
class ReadRequest:
    """A checked request; every default is filled in from the profile.

    Attributes
    ----------
    task : str or None
        None for free text without a task.
    text : str
        The user's turn as the model gets it: prompt, variables and the mode's suffix.
    answer, grammar : str
        What the answer is and how it is written, for `cxr_triton.reading.parse`.
    history : tuple of (role, text)
        Earlier turns as the model got and wrote them, ``user`` first, ``assistant`` last.
    seed : int or None
        None lets the decoder draw one.
    identifiers : str
        Of `cxr_triton.identity.IDENTIFIERS`.
    guide : str
        Of `cxr_triton.guide.GUIDES`.
    guide_grammar : str or None
        What the answer is held to; None where nothing is.
    logprobs : bool
    scoring : Scoring or None
        None where no scores are asked for.
    """

    task: str | None
    text: str
    mode: str
    answer: str
    grammar: str
    history: tuple[tuple[str, str], ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    identifiers: str
    guide: str
    guide_grammar: str | None
    logprobs: bool
    scoring: Scoring | None
    min_images: int
    max_images: int
    system_prompt: str | None

    @classmethod
    def from_json(cls, text: str | bytes, profile: ModelProfile) -> ReadRequest:
        """A request from its JSON text; empty text asks for the profile's default task.

        Raises
        ------
        InvalidRequest
            Not JSON, too large, an unknown or repeated key, or a value of the wrong type, length or range.
        """
        data = _parse(text)
        for key in data:
            if key not in _KEYS:
                raise InvalidRequest(unknown_key(key[:60], _KEYS, "REQUEST"))
        history = _history(data.get("history", []))
        is_free = data.get("prompt") is not None
        name = _text(data, "task", None if is_free else profile.default_task)
        if name is not None and name not in profile.tasks:
            raise InvalidRequest(f"REQUEST.task: {unknown_key(name[:60], profile.tasks, f'tasks of {profile.name}')}")
        mode_name = _text(data, "mode", profile.default_mode)
        if mode_name not in profile.modes:
            raise InvalidRequest(
                f"REQUEST.mode: {unknown_key(mode_name[:60], profile.modes, f'modes of {profile.name}')}"
            )
        task, mode = profile.tasks[name] if name is not None else None, profile.modes[mode_name]
        if task and task.follow_up and not history:
            raise InvalidRequest(
                f"REQUEST.history: is empty, but task {name!r} continues a conversation; send its turns"
            )
        answer = task.answer if task else "text"
        if mode.answers and answer not in mode.answers:
            raise InvalidRequest(
                f"REQUEST.mode: {mode_name!r} is for answers of {', '.join(mode.answers)}, and "
                f"{f'task {name!r}' if task else 'a free prompt'} is answered with {answer}; choose another mode"
            )
        prompt = _free_prompt(data) if is_free or task is None else _fill(task.prompt, data.get("variables", {}), name)
        prompt += mode.suffix
        guide, schema = _guide(data.get("guide"), mode.guide)
        held = None
        if schema is not None:
            answer, held = "json", schema_grammar(schema, grammar=mode.grammar)
        elif guide == "answer":
            options = next((value for value in data.get("variables", {}).values() if isinstance(value, list)), None)
            held = answer_grammar(
                grammar=mode.grammar, answer=answer, labels=profile.labels, options=options, prompt=prompt
            )
        limits = {**_RANGES, "max_new_tokens": (1, profile.max_sequence)}
        return cls(
            task=name,
            text=prompt,
            mode=mode_name,
            answer=answer,
            grammar=mode.grammar,
            history=history,
            **{key: _number(data, key, getattr(profile.decoding, key), *limits[key]) for key in limits},
            seed=_number(data, "seed", None, 0, MAX_SEED),
            stop=_stop(data.get("stop", [])),
            identifiers=_identifiers(data),
            guide=guide,
            guide_grammar=held,
            logprobs=_flag(data, "logprobs"),
            scoring=_scoring(data, task, answer, mode.grammar, profile.labels) if _flag(data, "scores") else None,
            min_images=task.min_images if task else 0,
            max_images=task.max_images if task else profile.max_images,
            system_prompt=profile.system_prompt,
        )

    def messages(self, n_images: int) -> list[dict[str, Any]]:
        """Chat messages for `cxr_triton.chat.ChatTokenizer.encode`.

        Images stand before the text of the first user turn, in the order of IMAGES: prior first, current last. Later
        turns are text, as both models' authors replay them.

        Raises
        ------
        InvalidRequest
            The task takes another number of images.
        """
        if not self.min_images <= n_images <= self.max_images:
            allowed = " to ".join(map(str, dict.fromkeys((self.min_images, self.max_images))))
            what = f"task {self.task!r}" if self.task else "a free prompt"
            raise InvalidRequest(f"IMAGES: {n_images} given, {what} takes {allowed}; send that many")
        turns = [*self.history, ("user", self.text)]
        messages: list[dict[str, Any]] = []
        if self.system_prompt is not None:
            messages.append({"role": "system", "content": self.system_prompt})
        for i, (role, text) in enumerate(turns):
            images = [{"type": "image"}] * n_images if i == 0 else []
            messages.append({"role": role, "content": [*images, {"type": "text", "text": text}]})
        return messages


def _parse(text: str | bytes) -> dict:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
    if len(raw) > MAX_REQUEST_BYTES:
        raise InvalidRequest(
            f"REQUEST: {len(raw)} bytes, allowed {MAX_REQUEST_BYTES}; shorten the history or the prompt"
        )
    if not raw.strip():
        return {}
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"REQUEST: not UTF-8 at byte {error.start}; send UTF-8 JSON") from None
    except RecursionError:
        raise InvalidRequest("REQUEST: nested too deeply; send one flat JSON object") from None
    except ValueError as error:
        raise InvalidRequest(f"REQUEST: not JSON: {error}; send one JSON object") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"REQUEST: is a JSON {type(data).__name__}, expected an object; send {{}} for the default")
    return data


def _object(pairs: list[tuple[str, object]]) -> dict:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidRequest(f"REQUEST: key {twice[:60]!r} is given twice; keep one")
    return data


def _constant(name: str):
    raise InvalidRequest(f"REQUEST: {name} is not JSON; send a finite number")


def _checked(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}: is {type(value).__name__}, expected text")
    if len(value) > MAX_TEXT_CHARS:
        raise InvalidRequest(f"{where}: {len(value)} characters, allowed {MAX_TEXT_CHARS}; shorten it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{where}: half a surrogate pair at character {error.start}; send valid Unicode") from None
    return value


Default = TypeVar("Default", bound=str | None)


def _text(data: dict, key: str, default: Default) -> str | Default:
    return _checked(data[key], f"REQUEST.{key}") if data.get(key) is not None else default


def _identifiers(data: dict) -> str:
    value = _text(data, "identifiers", "plain")
    if value not in IDENTIFIERS:
        raise InvalidRequest(f"REQUEST.identifiers: {value[:60]!r} is none of {', '.join(IDENTIFIERS)}")
    return value


def _guide(value: object, default: str) -> tuple[str, dict | None]:
    """What guides the answer, and a schema of the user's."""
    if value is None:
        return default, None
    if isinstance(value, str):
        if value not in MODE_GUIDES:
            raise InvalidRequest(f"REQUEST.guide: {unknown_key(value[:60], MODE_GUIDES, 'guides')}")
        return value, None
    if not (isinstance(value, dict) and list(value) == ["json_schema"] and isinstance(value["json_schema"], dict)):
        raise InvalidRequest('REQUEST.guide: expected "none", "answer" or {"json_schema": {...}}')
    return "json_schema", value["json_schema"]


def _flag(data: dict, key: str) -> bool:
    value = data.get(key, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"REQUEST.{key}: is {type(value).__name__}, expected true or false")
    return value


def _scoring(data: dict, task: Task | None, answer: str, grammar: str, labels: tuple[str, ...]) -> Scoring:
    if answer == "option":
        options = data.get("variables", {}).get("options", "")
        choices = options if isinstance(options, list) else _LETTERED.findall(options)
        return Scoring(grammar=grammar, answer=answer, choices=tuple(choices))
    if answer not in ("labels", "text") or not labels:
        what = "a free prompt's answer has no labels in the served profile"
        if answer == "json":
            what = "the guide makes the answer JSON"
        elif task:
            what = f"the task answers in {answer}" if labels or answer != "text" else "the served profile has no labels"
        raise InvalidRequest(f"REQUEST.scores: {what}; scores are of labels and of options, so leave it out")
    return Scoring(grammar=grammar, answer=answer, choices=labels)


def _number(data: dict, key: str, default, low, high):
    value = data.get(key)
    if value is None:
        return default
    kind = float if isinstance(low, float) else int
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise InvalidRequest(f"REQUEST.{key}: is {type(value).__name__}, expected {kind.__name__}")
    if not low <= value <= high:
        raise InvalidRequest(f"REQUEST.{key}: {value!r:.24} is outside {low} to {high}")
    return kind(value)


def _history(turns: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(turns, list):
        raise InvalidRequest(f"REQUEST.history: is {type(turns).__name__}, expected a list of turns")
    if len(turns) > MAX_TURNS:
        raise InvalidRequest(f"REQUEST.history: {len(turns)} turns, allowed {MAX_TURNS}; drop the oldest")
    pairs = []
    for i, turn in enumerate(turns):
        where = f"REQUEST.history[{i}]"
        if not isinstance(turn, dict):
            raise InvalidRequest(f"{where}: is {type(turn).__name__}, expected an object with role and content")
        for key in turn:
            if key not in ("role", "content"):
                raise InvalidRequest(unknown_key(key[:60], ("role", "content"), where))
        expected = ("user", "assistant")[i % 2]
        if turn.get("role") != expected:
            raise InvalidRequest(f"{where}.role: is {turn.get('role')!r:.60}, expected {expected!r}; turns alternate")
        pairs.append((expected, _checked(turn.get("content"), f"{where}.content")))
    if len(pairs) % 2:
        raise InvalidRequest("REQUEST.history: ends with the user's turn, expected the assistant's answer to it")
    return tuple(pairs)


def _stop(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) > MAX_STOPS:
        raise InvalidRequest(f"REQUEST.stop: expected a list of at most {MAX_STOPS} texts")
    for i, value in enumerate(values):
        if not 1 <= len(_checked(value, f"REQUEST.stop[{i}]")) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"REQUEST.stop[{i}]: {len(value)} characters, allowed 1 to {MAX_STOP_CHARS}")
    return tuple(values)


def _free_prompt(data: dict) -> str:
    prompt = _text(data, "prompt", "")
    if "variables" in data:
        raise InvalidRequest("REQUEST.variables: belong to a task's prompt and a free prompt is given; drop one")
    if not prompt.strip():
        raise InvalidRequest("REQUEST.prompt: is empty; leave it out to use the task's prompt")
    return prompt


def _fill(prompt: str, variables: object, task: str | None) -> str:
    names = tuple(dict.fromkeys(PLACEHOLDER.findall(prompt)))
    if not isinstance(variables, dict):
        raise InvalidRequest(f"REQUEST.variables: is {type(variables).__name__}, expected an object of texts")
    for key in variables:
        if key not in names:
            raise InvalidRequest(unknown_key(key[:60], names, f"REQUEST.variables of task {task!r}"))
    for name in names:
        if name not in variables:
            raise InvalidRequest(f"REQUEST.variables.{name}: is missing; task {task!r} needs {', '.join(names)}")
    values = {name: _variable(variables[name], f"REQUEST.variables.{name}") for name in names}
    return PLACEHOLDER.sub(lambda match: values[match[1]], prompt)


def _variable(value: object, where: str) -> str:
    if isinstance(value, list):
        if not 1 <= len(value) <= MAX_OPTIONS:
            raise InvalidRequest(f"{where}: {len(value)} options, allowed 1 to {MAX_OPTIONS}")
        lines = [f"({chr(65 + i)}) {_checked(option, f'{where}[{i}]')}" for i, option in enumerate(value)]
        return "\n".join(lines)
    text = _checked(value, where)
    if not text.strip():
        raise InvalidRequest(f"{where}: is empty; give its text")
    return text
