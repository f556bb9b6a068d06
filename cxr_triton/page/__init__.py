"""Every HTML page: one self-contained file without script, font or request to anywhere, out of the templates here.

Templates get plain data. Whatever they write passes through `printable` and jinja2's autoescape, so that text of a
model, a server or a file stays text.
"""

from __future__ import annotations

import base64
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton import __version__, numbers
from cxr_triton.cli import printable
from cxr_triton.reading import NOT_FOR_DIAGNOSIS

if TYPE_CHECKING:
    import jinja2


def render(template: str, **data: object) -> str:
    """HTML of a page.

    Parameters
    ----------
    template : str
        Name of a file in this folder that extends ``frame.html``.
    **data
        What it asks for; a missing name is an error. None becomes —.
    """
    return _environment().get_template(template).render(data)


def paragraphs(text: str) -> list[list[str]]:
    """Of a model's text, for the macro ``prose`` of parts.html: runs, of which every second one was in ``**``."""
    blocks = (block.strip() for block in re.split(r"\n\s*\n", text))
    return [re.split(r"\*\*(.+?)\*\*", block) for block in blocks if block]


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    def data_uri(png: bytes) -> Markup:
        return Markup("data:image/png;base64,{}").format(base64.b64encode(png).decode())

    def harmless(value: object) -> object:
        return value if isinstance(value, Markup) else printable(numbers.number(value) if value is None else str(value))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=harmless,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"data_uri": data_uri, "paragraphs": paragraphs}
    environment.globals |= {"NOT_FOR_DIAGNOSIS": NOT_FOR_DIAGNOSIS, "version": __version__}
    return environment
