"""Read every file of a folder through a running server, and write a line of CSV for each."""

import asyncio
import csv
import sys
from pathlib import Path

import click

from cxr_triton.client import AsyncReader
from cxr_triton.errors import CxrError, QueueFull, Unavailable


async def read(reader: AsyncReader, path: Path, free: asyncio.Semaphore) -> tuple[str, str, str]:
    """File, status or error code, labels or reason."""
    async with free:
        for wait_s in (1, 5, 20, None):
            try:
                reading = await reader.read(path).result()
                return path.name, reading.status, ", ".join(finding.label for finding in reading.findings)
            except (QueueFull, Unavailable) as error:
                if wait_s is None:
                    return path.name, error.code, error.message
                await asyncio.sleep(wait_s)
            except CxrError as error:  # of this file, or of how it was asked
                return path.name, error.code, error.message


async def read_all(folder: Path, url: str, at_once: int) -> None:
    """Write a row for each file, as its reading ends."""
    free = asyncio.Semaphore(at_once)
    table = csv.writer(sys.stdout)
    table.writerow(["file", "status", "labels or reason"])
    async with AsyncReader(url) as reader:
        readings = [read(reader, path, free) for path in sorted(folder.iterdir()) if path.is_file()]
        for reading in asyncio.as_completed(readings):
            table.writerow(await reading)


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--url", default="127.0.0.1:8001", show_default=True)
@click.option("--at-once", default=4, show_default=True)
def main(folder: Path, url: str, at_once: int) -> None:
    """Read FOLDER. Research only, never for diagnosis."""
    asyncio.run(read_all(folder, url, at_once))


if __name__ == "__main__":
    main()
