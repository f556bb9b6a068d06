"""Read a radiograph, then ask on about it: each turn is sent with all turns before it."""

from pathlib import Path

import click

from cxr_triton.client import Reader


@click.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("tasks", nargs=-1, required=True)
@click.option("--url", default="127.0.0.1:8001", show_default=True)
def main(image: Path, tasks: tuple[str, ...], url: str) -> None:
    """Read IMAGE with the profile's default task, then ask TASKS in turn. Research only, never for diagnosis."""
    with Reader(url) as reader:
        conversation = reader.open(image)
        for task in (None, *tasks):
            stream = conversation.ask(task=task)
            print(f"\n== {task or 'first turn'}")
            for delta in stream:
                print(delta, end="", flush=True)
    print(f"\n\n{conversation.turns[-1].notice}")


if __name__ == "__main__":
    main()
