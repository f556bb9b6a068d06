"""Train the demonstration model (`training`) and write it as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from cxr_triton.cli import Command


@click.command(cls=Command, extra="export")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "checkpoint", show_default=True
)
@click.option("--pictures", default=8000, show_default=True)
@click.option("--vision-steps", default=450, show_default=True)
@click.option("--answer-steps", default=900, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, pictures: int, vision_steps: int, answer_steps: int, seed: int):
    """Train on the CPU and write the checkpoint to --out; the last save is the one to keep."""
    from training import train

    train(out, pictures=pictures, vision_steps=vision_steps, answer_steps=answer_steps, seed=seed)


if __name__ == "__main__":
    main()
