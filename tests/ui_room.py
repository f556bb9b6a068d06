"""What tests of the reading room's page share: what is looked for in it, and where in sight boxes have to be."""

import asyncio
import json
from pathlib import Path

import numpy as np
from chromium import is_color

ROWS, COLUMNS = 2500, 2000  # 5 megapixels
BOX = (20.0, 30.0, 60.0, 80.0)
YELLOW = (255, 210, 63)
STAGE = "(({ x, y, width, height }) => [x, y, width, height])(document.querySelector('.stage').getBoundingClientRect())"
WIDE = "[...document.querySelectorAll('body *')].filter((each) => each.getBoundingClientRect().right > innerWidth + 1)"
DRAWN = "document.querySelector('.pane figcaption')?.textContent.includes('%')"
READ = "document.querySelector('#question .primary').click()"
SAVE = "document.querySelector('.files [aria-label=\"Save as {}\"]').click()"


def given(folder: Path, data: bytes, name="chest.dcm") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def texts(selector: str, what: str = "innerText") -> str:
    """An expression: what is written in each element."""
    return f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.{what})"


def fit(stage, width=COLUMNS, height=ROWS):
    """Scale, and where in sight a picture's pixel (0, 0) is, as a viewer that shows the whole picture has them."""
    left, top, wide, high = stage
    scale = min(wide / width, high / height)
    return scale, left + (wide - width * scale) / 2, top + (high - height * scale) / 2


def sides(stage, factor=1.0):
    """The middles of the four sides of `BOX` in sight, the picture zoomed by a factor around the stage's middle."""
    scale, x, y = fit(stage)
    middle = np.array([stage[0] + stage[2] / 2, stage[1] + stage[3] / 2])
    x0, y0, x1, y1 = np.array(BOX) / 100 * (COLUMNS, ROWS, COLUMNS, ROWS) * scale
    points = np.array([((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1), (x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2)])
    return middle + (points + np.array([x, y]) - middle) * factor


def is_boxed(pixels, x: float, y: float) -> bool:
    """Whether a box's line goes through a point, to a pixel."""
    column, row = round(x), round(y)
    return bool(is_color(pixels[row - 1 : row + 2, column - 1 : column + 2], YELLOW, 60).any())


async def until_boxed(page, points, but_not=()) -> None:
    """Returns once lines of boxes go through all of some points, and through none of others."""
    while True:
        pixels = await page.pixels()
        if all(is_boxed(pixels, *at) for at in points) and not any(is_boxed(pixels, *at) for at in but_not):
            return


async def wait(is_so) -> None:
    while not is_so():
        await asyncio.sleep(0.03)


async def drag(page, begin, end, button: str) -> None:
    held = {"button": button, "buttons": {"left": 1, "right": 2}[button]}
    await page.mouse("mousePressed", *begin, **held, clickCount=1)
    await page.mouse("mouseMoved", *end, **held)
    await page.mouse("mouseReleased", *end, button=button, clickCount=1)
