"""DATA.yaml: which labelled data, what counts as true in it, and what is asked about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from cxr_triton.config import Checked, build, in_range, one_of, read_yaml
from cxr_triton.errors import InvalidConfig, InvalidRequest
from cxr_triton.evaluate.rows import KINDS, POLICIES

ASKS = ("set", "options", "each")
PICTURES = ("frontal", "all", "each")
READERS = ("majority", "any", "all")


@dataclass(frozen=True, kw_only=True)
class Data(Checked):
    """A data set and how it is asked; keys of DATA.yaml.

    Attributes
    ----------
    path : str
        Folder of the data set, or its one file; relative to the YAML.
    format : str
        Of `cxr_triton.evaluate.adapters.FORMATS`.
    name : str
        What results call it; the format's name by default.
    split : str
        As the data set names it.
    kind : str
        Of `cxr_triton.evaluate.rows.KINDS`; the format's first by default.
    uncertain, blank : str
        What an uncertain and an empty label count as: ``zeros``, ``ones`` or ``ignore``.
    readers : str
        Of several readers, who decides: the ``majority``, ``any`` or ``all``.
    labeller : str
        Of MIMIC-CXR: ``chexpert``, ``negbio`` or ``radiologist``.
    pictures : str
        ``frontal``: the first frontal one of a study; ``all`` in one request; ``each`` as a study of its own.
    views : tuple of str
        Keep only these, in capitals, such as ``PA``; empty keeps all.
    suffix : str or None
        Of the pictures' files, in place of that which the table says.
    mapping : dict of str to str
        The data set's labels to ours, laid over the format's; an empty text maps to nothing.
    labels : tuple of str
        What is judged; by default all that `mapping` leads to.
    groups : tuple of str
        Further columns of a table of one's own that become groups.
    limit : int or None
        Most studies, drawn by `seed`; None takes all.
    seed : int
        Of the sample, and of sampled tokens.
    task, prompt, mode : str or None
        What is asked, as `cxr-triton read` takes it. A prompt may hold ``{question}``, ``{options}`` and such.
    ask : str
        Of kind ``labels``: ``set`` asks for the list once; ``options`` gives the labels as options of one question;
        ``each`` asks about one after the other and takes Yes or No.
    variables : dict of str to str
        Placeholders of the task's prompt, with the study's own in braces: ``{disease}``.
    max_new_tokens : int or None
    temperature, top_p, repetition_penalty : float or None
    scores : bool
        Ask how sure the model is of each label or option too.
    """

    path: str = "."
    format: str
    name: str = ""
    split: str = "test"
    kind: str = ""
    uncertain: str = one_of(POLICIES, default="ignore")
    blank: str = one_of(POLICIES, default="zeros")
    readers: str = one_of(READERS, default="majority")
    labeller: str = one_of(("chexpert", "negbio", "radiologist"), default="chexpert")
    pictures: str = one_of(PICTURES, default="frontal")
    views: tuple[str, ...] = ()
    suffix: str | None = None
    mapping: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = in_range(0, 2**63 - 1, default=0)
    task: str | None = None
    prompt: str | None = None
    mode: str | None = None
    ask: str = one_of(ASKS, default="set")
    variables: dict[str, str] = field(default_factory=dict)
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    scores: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in ("", *KINDS):
            raise self.error(f"kind: {self.kind!r} is none of {', '.join(KINDS)}")
        if self.limit is not None and self.limit < 1:
            raise self.error(f"limit: {self.limit} is less than 1")
        if self.prompt and (self.task or self.variables):
            raise self.error("prompt: asks in place of a task; drop task and variables")

    @property
    def folder(self) -> Path:
        """That of the data set, also where `path` is its one file."""
        path = Path(self.path)
        return path if path.is_dir() else path.parent


def load_data(path: str | Path, **given) -> Data:
    """The data set that a YAML file or a path describes; `given` values that are not None win.

    Raises
    ------
    InvalidConfig
        The YAML is none, or a key of it is unknown or impossible; names it.
    InvalidRequest
        There is nothing at the path, or its format is not said.
    """
    path = Path(path)
    said = {key: value for key, value in given.items() if value is not None}
    if path.suffix.lower() in (".yaml", ".yml"):
        data = build(Data, read_yaml(path, InvalidConfig), path.name)
        data = dataclasses.replace(data, path=str((path.parent / data.path).resolve()))
    elif "format" not in said:
        raise InvalidRequest(f"{path}: of which format is it? give --format, or a YAML file that says it")
    else:
        data = Data(path=str(path.resolve()), format=said["format"])
    data = dataclasses.replace(data, **said)
    if not Path(data.path).exists():
        raise InvalidRequest(f"{data.path}: is not there; give the folder that the data set was unpacked into")
    return data
