"""ReXVQA, and other JSON of closed questions: an object of questions by name, or a list of them.

A question has its picture or pictures, its options, and its answer by letter or in full. ReXVQA's keys are taken, and
the plain ones: ``images`` or ``image``, ``question``, ``options``, ``answer``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate.study import Source, Studies, Study, groups, sex

_LETTERED = re.compile(r"\s*\(?([A-Z])[.):]\s+(.*)", re.DOTALL)
_YES_NO = {"yes": "Yes", "no": "No"}


def studies(source: Source) -> Studies:
    """Questions in the order of the file; the whole file is read at once."""
    given = Path(source.data.path)
    path = (
        given
        if given.is_file()
        else source.file(f"metadata/{source.data.split}_vqa_data.json", f"{source.data.split}*.json")
    )
    try:
        asked = json.loads(path.read_bytes())
        items = asked.items() if isinstance(asked, dict) else ((str(i), item) for i, item in enumerate(asked))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"{path}: is no JSON of questions: {error}") from None
    for name, item in items:
        if not isinstance(item, dict):
            raise InvalidRequest(f"{path}: question {name} is {type(item).__name__}, expected an object")
        yield _study(source, str(item.get("id", name)), item, path)


def _study(source: Source, name: str, item: dict[str, Any], path: Path) -> Study:
    question = str(_first(item, path, name, "question"))
    options = plain_options(_first(item, path, name, "options"))
    right, fault = right_options(_first(item, path, name, "correct_answer", "answer"), options)
    pictures = _first(item, path, name, "ImagePath", "images", "image")
    views = _list(item.get("ImageViewPosition"))
    return Study(
        name=name,
        patient=str(item.get("PatientID") or item.get("patient") or item.get("study_id") or ""),
        images=tuple(
            source.image(_below(picture), "", "deid_png", view=views[i] if i < len(views) else "")
            for i, picture in enumerate(_list(pictures))
        ),
        groups=groups(
            view=(views or [""])[0].upper(),
            sex=sex(str(item.get("PatientSex") or "")),
            age=str(item.get("PatientAge") or ""),
            question=str(item.get("task_name") or item.get("category") or ""),
        ),
        options=right,
        variables={"question": question, "options": options},
        fault=fault,
    )


def _first(item: dict[str, Any], path: Path, name: str, *keys: str) -> Any:
    for key in keys:
        if item.get(key) not in (None, "", [], {}):
            return item[key]
    raise InvalidRequest(f"{path.name}: question {name} has no {' or '.join(keys)}; it has {', '.join(item)}")


def _list(value: Any) -> list[str]:
    return [] if value is None else [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _below(path: str) -> str:
    """A path such as ``../deid_png/…``, from the data set's folder."""
    return "/".join(part for part in PurePosixPath(path).parts if part not in ("..", "/"))


def plain_options(options: Any) -> list[str]:
    """Options without their letters, in the letters' order."""
    if isinstance(options, dict):
        return [str(options[letter]) for letter in sorted(options)]
    texts = _list(options)
    found = [_LETTERED.fullmatch(text) for text in texts]
    if all(match and match[1] == chr(65 + i) for i, match in enumerate(found)):
        return [match[2] for match in found if match]
    return texts


def right_options(answer: Any, options: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Letters of an answer (or ``Yes``, ``No`` where there are no options), and what is wrong with it, if anything."""
    letters = [chr(65 + i) for i in range(len(options))]
    right = []
    for part in _list(answer):
        plain = part.strip()
        by_text = [letter for letter, option in zip(letters, options, strict=True) if option.strip() == plain]
        lettered = _LETTERED.fullmatch(f"{plain} ")
        letter = plain.strip("().").upper() if len(plain.strip("().")) == 1 else lettered[1] if lettered else ""
        if not options and plain.lower() in _YES_NO:
            right.append(_YES_NO[plain.lower()])
        elif letter in letters:
            right.append(letter)
        elif by_text:
            right.append(by_text[0])
        else:
            return (), f"the answer {part!r:.60} is none of the {len(options)} options"
    return tuple(right), ""
