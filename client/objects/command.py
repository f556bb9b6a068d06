"""`cxr-triton sr`: the DICOM and FHIR objects of a reading as files."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from pydicom import Dataset

from cxr_triton.cli import EXIT_NOT_AS_ASKED, OUT_FOLDER, TASKS, json_option, printable, write_json
from cxr_triton.client.command import (
    FILE,
    connect,
    connection,
    received,
    require_readings_of,
    stored_reading,
    unchecked_reading_option,
)
from cxr_triton.client.objects import KINDS
from cxr_triton.client.objects.results import diagnostic_report, encoded, result_objects
from cxr_triton.client.objects.source import header_faults, source_header
from cxr_triton.client.objects.study import ObjectOptions
from cxr_triton.client.page import DOCUMENT_PIXELS, Shown, draw
from cxr_triton.files import write
from cxr_triton.identity import sha256
from cxr_triton.reading import NOT_FOR_DIAGNOSIS, Reading


def _kinds(context, parameter, value: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in value.split(",")))
    for kind in kinds:
        if kind not in (*KINDS, "fhir"):
            raise click.BadParameter(f"{kind!r} is none of {', '.join(KINDS)}, fhir")
    return kinds


@click.command(short_help="Write a reading as DICOM SR and FHIR objects.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE)
@click.option(
    "--reading",
    "reading_path",
    type=FILE,
    metavar="READING.json",
    help="What `read --json` wrote about these files; the server reads them where it is left out.",
)
@unchecked_reading_option
@click.option("-o", "--out", required=True, type=OUT_FOLDER, help="Folder of the objects; made if it is not there.")
@click.option(
    "--kinds",
    default="findings_sr,text_sr,fhir",
    show_default=True,
    callback=_kinds,
    metavar="LIST",
    help=f"Of {', '.join(KINDS)}, fhir; with commas.",
)
@click.option("--task", shell_complete=TASKS, metavar="NAME", help="What to ask the server.")
@click.option(
    "--scores", is_flag=True, help="Write how sure the model is of each label too, where the reading says it."
)
@connection
@json_option
def sr(*, files, reading_path, unchecked_reading, out, kinds, task, scores, json_path, **server):
    """Write the objects of a reading into a folder: structured reports, presentation state, PDF, FHIR report.

    FILEs are the DICOM images that were read, in their order: prior first, current last. The objects belong to the
    current image's study. They are preliminary and unverified, and the same files and READING give the same bytes;
    their time is that of the READING file.

    Exit status: 0 when the reading is well formed; 3 when it is malformed, truncated, out of vocabulary or of a
    doubtful image (the objects are written all the same, and say it); 1 when there is none; 75 when the server is busy
    or out of reach; 2 for wrong usage; 130 after Ctrl-C.
    """
    images = [file.read_bytes() for file in files]
    sources = [source_header(data) for data in images]
    warnings = [f"{file.name}: {fault}" for file, source in zip(files, sources, strict=True)
                for fault in header_faults(source)]  # fmt: skip
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    if reading_path and task:
        raise click.UsageError("--task asks a server, --reading takes what one answered; give one of them")
    if reading_path:
        reading = stored_reading(reading_path.name, reading_path.read_bytes())
        require_readings_of(files, images, [(reading_path.name, reading)], unchecked_reading=unchecked_reading)
        made_at = datetime.datetime.fromtimestamp(int(reading_path.stat().st_mtime)).astimezone()
    else:
        reading = received(connect(images, **server), files, images, task=task, scores=scores or None)
        made_at = datetime.datetime.now().astimezone().replace(microsecond=0)
    options = ObjectOptions(
        made_at=made_at,
        digests=tuple(map(sha256, images)),
        unchecked_reading=unchecked_reading,
        scores=scores,
    )
    if scores and not reading.scores:
        warnings.append("the reading has no scores; `read --scores` asks for them, of labels and options")
        click.echo(f"warning: {warnings[-1]}", err=True)
    pictures: Sequence[Shown] = ()
    if "pdf" in kinds:
        names = [file.name for file in files]
        pictures = draw(images, reading, names=names, max_pixels=DOCUMENT_PIXELS, unchecked_reading=unchecked_reading)
    out.mkdir(exist_ok=True)
    written = _write(
        out / (reading_path or files[-1]).stem,
        kinds,
        reading=reading,
        sources=sources,
        pictures=pictures,
        options=options,
    )
    said_to = sys.stderr if json_path == "-" else sys.stdout
    for item in written:
        click.echo(f"{item['kind']:<12} {printable(item['path'])}", said_to)
    if "gsps" in kinds and not any(item["kind"] == "gsps" for item in written):
        click.echo("gsps         none: the reading has no box", said_to)
    click.echo(f"{NOT_FOR_DIAGNOSIS} The objects are preliminary and unverified.", said_to)
    write_json({"status": reading.status, "objects": written, "warnings": warnings}, json_path)
    if reading.status != "ok":
        sys.exit(EXIT_NOT_AS_ASKED)


def _write(
    stem: Path,
    kinds: Sequence[str],
    *,
    reading: Reading,
    sources: Sequence[Dataset],
    pictures: Sequence[Shown],
    options: ObjectOptions,
) -> list[dict[str, str]]:
    """Files of each kind, whose names begin with `stem`; what `--json` says of each."""
    content, written = json.loads(reading.to_json()), []
    for kind in kinds:
        if kind == "fhir":
            path = f"{stem}-fhir.json"
            report = diagnostic_report(content, sources, options=options)
            write(Path(path), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
            written.append({"kind": kind, "path": path})
            continue
        instances = result_objects(content, sources, kinds=[kind], pictures=pictures, options=options)
        for number, instance in enumerate(instances, 1):
            path = f"{stem}-{kind}.dcm" if number == 1 else f"{stem}-{kind}-{number}.dcm"
            write(Path(path), encoded(instance))
            written.append({"kind": kind, "path": path, "sop_instance_uid": str(instance.SOPInstanceUID)})
    return written
