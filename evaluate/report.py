"""A result measured, alone or against another, and written as JSON, CSV and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_triton.evaluate import compare, rows
from cxr_triton.evaluate.gallery import pictures
from cxr_triton.evaluate.intervals import RESAMPLES
from cxr_triton.evaluate.kinds import Columns
from cxr_triton.evaluate.page import evaluation_page, shown_cases
from cxr_triton.evaluate.rows import Row
from cxr_triton.evaluate.summary import summarize
from cxr_triton.evaluate.terms import is_aside, title, told

SAID = ("recall", "specificity", "f1", "auroc", "ap_50")
"""Of a label, on a terminal."""


@dataclass(frozen=True)
class Report:
    """What a result says.

    Attributes
    ----------
    summary : dict
        As docs/evaluation.schema.json describes it, with its comparison.
    rows, other : sequence of Row
        Of the result, and of the one that it was compared with.
    """

    summary: dict[str, Any]
    rows: Sequence[Row]
    other: Sequence[Row]

    def lines(self) -> list[str]:
        """What it says in short, for a terminal."""
        studies = self.summary["studies"]
        lines = [f"{studies['asked']} studies of {studies['patients']} patients, {studies['failed']} not read"]
        for name, estimate in self.summary["measures"].items():
            if not is_aside(name):
                lines.append(f"{title(name)}: {told(estimate)}")
        for entry in self.summary["labels"]:
            shown = [f"{title(name)} {told(entry['measures'][name])}" for name in SAID if name in entry["measures"]]
            lines.append(f"{entry['label']}: {', '.join(shown)}")
        if comparison := self.summary["comparison"]:
            lines.append(f"against {comparison['a']['model'].get('engine')}: {comparison['verdict']}")
            decide = [entry for entry in comparison["measures"] if entry["decides"]]
            lines += [f"{title(each['measure'])}: {told(each['difference'])}, {each['verdict']}" for each in decide]
        return [line.replace("\u00a0", " ") for line in lines]

    def page(self, images: Path | None = None) -> str:
        """HTML; with the pictures of the cases that it shows where `images` is the data set's folder."""
        comparison = self.summary["comparison"]
        chosen = set(shown_cases(self.summary, comparison))
        shown = pictures([row for row in self.rows if row.number in chosen], images) if images else None
        return evaluation_page(self.summary, self.rows, shown, comparison=comparison, other=self.other)


def measured(
    result: Path,
    against: Path | None = None,
    *,
    margin: float = compare.MARGIN,
    resamples: int = RESAMPLES,
    seed: int = 0,
    identifiers: bool = False,
) -> Report:
    """Measure a result.

    Parameters
    ----------
    result : Path
        As `cxr_triton.evaluate.rows.write` wrote it.
    against : Path, optional
        Result of another engine on the same data, which this one is compared with.
    margin : float
        See `cxr_triton.evaluate.compare.compare`.
    resamples, seed : int
        Of the intervals; a comparison takes twice as many.
    identifiers : bool
        Name studies and patients of the worst cases.

    Raises
    ------
    InvalidRequest
        A file is no result, or the two are of other data.
    OSError
        One cannot be read.
    """
    columns = _columns(result)
    summary = summarize(columns, count=resamples, seed=seed, identifiers=identifiers)
    other = _columns(against) if against else None
    comparison = compare.compare(other, columns, margin=margin, count=2 * resamples, seed=seed) if other else None
    return Report(summary | {"comparison": comparison}, columns.rows, other.rows if other else ())


def _columns(path: Path) -> Columns:
    read = rows.read(path)
    return Columns(read.header, read)
