"""Synthetic radiograph phantoms: ellipses and lines that stand for a chest, with the findings drawn into them.

No anatomy of any person. A phantom is drawn as 12 to 16-bit stored values, as a detector gives them, so that it
takes the same way through the pixel pipeline as a radiograph.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cxr_triton.pixels.display import mimic_jpg, voi_display
from cxr_triton.pixels.transforms import Window

LABELS = ("Cardiomegaly", "Pleural Effusion", "Pneumothorax", "Lung Opacity", "Support Devices")
SIDED = ("Pleural Effusion", "Pneumothorax", "Lung Opacity")
SIDES = ("right", "left")  # of the patient: right is on the left of the picture
PHOTOMETRICS = ("MONOCHROME1", "MONOCHROME2")

DEFAULT_PROMPT = "Find abnormalities and support devices."


@dataclass(frozen=True, eq=False)
class Phantom:
    """One synthetic radiograph.

    Attributes
    ----------
    stored : uint16 [rows, cols]
        Stored values with white high (MONOCHROME2).
    bits_stored : int
        12 to 16.
    window : (center, width) or None
        VOI window for `stored`, function LINEAR.
    findings : dict
        Label to side ("right", "left", or "" for a finding without one), in the order of `LABELS`.
    masks : dict
        Label to bool [rows, cols]: where the finding is drawn.
    """

    stored: np.ndarray
    bits_stored: int
    window: tuple[float, float] | None
    findings: dict[str, str]
    masks: dict[str, np.ndarray]

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the findings, ``No Finding`` where there are none."""
        return tuple(self.findings) or ("No Finding",)

    def encoded(self, photometric: str) -> tuple[np.ndarray, tuple[float, float] | None]:
        """Stored values and window for a photometric interpretation; MONOCHROME1 is the exact inverted twin."""
        if photometric == "MONOCHROME2":
            return self.stored, self.window
        top = 2**self.bits_stored - 1
        # LINEAR places the center half a value low (PS3.3 C.11.2.1.2.1), hence the 1 when the axis is turned.
        window = (top - self.window[0] + 1, self.window[1]) if self.window else None
        return (top - self.stored).astype(np.uint16), window

    def picture(self, preset: str, photometric: str = "MONOCHROME2") -> np.ndarray:
        """uint8 [rows, cols] picture through the product's display presets."""
        stored, window = self.encoded(photometric)
        monochrome1 = photometric == "MONOCHROME1"
        if preset == "mimic_jpg":
            return mimic_jpg(stored, monochrome1)
        voi = Window(*window) if window else None
        return voi_display(stored, monochrome1=monochrome1, bits_stored=self.bits_stored, voi=voi)


def draw(rng: np.random.Generator) -> Phantom:
    """A phantom of 200 to 420 pixels a side with each finding drawn in about a third of all."""
    rows, cols = (int(n) for n in rng.integers(200, 421, 2))
    y = ((np.arange(rows, dtype=np.float32) + 0.5) / rows)[:, None]
    x = ((np.arange(cols, dtype=np.float32) + 0.5) / cols)[None, :]
    y, x = y - np.float32(rng.uniform(-0.02, 0.02)), x - np.float32(rng.uniform(-0.02, 0.02))

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return ((x - np.float32(cx)) / np.float32(rx)) ** 2 + ((y - np.float32(cy)) / np.float32(ry)) ** 2

    present = rng.random(len(LABELS)) < (0.33, 0.33, 0.3, 0.3, 0.3)
    findings = {
        label: SIDES[rng.integers(2)] if label in SIDED else ""
        for label, drawn in zip(LABELS, present, strict=True)
        if drawn
    }

    image = np.where(ellipse(0.5, 0.55, 0.47, 0.6) < 1, np.float32(0.62), np.float32(0.05))
    width, height = rng.uniform(0.16, 0.185), rng.uniform(0.31, 0.36)
    top = 0.47 + rng.normal(0, 0.01)
    lungs = {"right": ellipse(0.28, top, width, height), "left": ellipse(0.72, top, width, height)}
    for radius in lungs.values():
        image[radius < 1] = 0.22

    heart = rng.uniform(0.21, 0.25) if "Cardiomegaly" in findings else rng.uniform(0.11, 0.14)
    masks = {"Cardiomegaly": ellipse(0.55, 0.62, heart, 0.16) < 1}
    image[masks["Cardiomegaly"]] = 0.8
    spine = np.abs(x[0] - 0.5) < 0.035
    image[:, spine] = np.maximum(image[:, spine], 0.72)
    for radius, cx in zip(lungs.values(), (0.28, 0.72), strict=True):
        rib = (y - np.float32(0.35) * (x - np.float32(cx)) ** 2 - np.float32(0.2)) / np.float32(0.065)
        number = np.rint(rib)
        image[(np.abs(rib - number) < 0.09) & (number >= 0) & (number <= 8) & (radius < 1)] += 0.09

    if side := findings.get("Pleural Effusion"):
        masks["Pleural Effusion"] = (lungs[side] < 1) & (y > rng.uniform(0.62, 0.7))
        image[masks["Pleural Effusion"]] = 0.85
    if side := findings.get("Pneumothorax"):
        masks["Pneumothorax"] = (lungs[side] < 1) & (lungs[side] > 0.5) & (y < 0.45)
        image[masks["Pneumothorax"]] = 0.04
    if side := findings.get("Lung Opacity"):
        cx, size = (0.28 if side == "right" else 0.72) + rng.uniform(-0.05, 0.05), rng.uniform(0.08, 0.11)
        radius = ellipse(cx, rng.uniform(0.3, 0.5), size, size)
        masks["Lung Opacity"] = radius < 1
        np.maximum(image, 0.85 * np.exp(-radius), out=image)
    if "Support Devices" in findings:
        line = np.abs(x - np.float32(0.5 + rng.uniform(-0.2, 0.2)) - np.float32(0.1) * np.sin(4 * y)) < 0.013
        masks["Support Devices"] = line & (y < 0.55)
        image[masks["Support Devices"]] = 1.0
    image += np.float32(0.02) * rng.standard_normal(image.shape, dtype=np.float32)

    bits_stored = int(rng.choice((12, 13, 14, 16)))
    black, white = rng.uniform(0.0, 0.15), rng.uniform(0.7, 1.0)
    exposed = black + (white - black) * np.clip(image, 0, 1) ** rng.uniform(0.8, 1.25)
    scale = 2**bits_stored - 1
    window = None
    if rng.random() < 0.5:
        low, high = black + rng.uniform(-0.05, 0.02), white + rng.uniform(-0.02, 0.05)
        window = (round((low + high) / 2 * scale), round((high - low) * scale))
    masks = {label: masks[label] for label in findings}
    return Phantom(np.rint(exposed * scale).astype(np.uint16), bits_stored, window, findings, masks)


def _walk(findings: dict[str, str]) -> list[str]:
    pleura = []
    if side := findings.get("Pleural Effusion"):
        pleura.append(f"fluid level at the {side} base")
    if side := findings.get("Pneumothorax"):
        pleura.append(f"lucency without markings at the {side} apex")
    return [
        "Devices: " + ("a radiopaque line is seen." if "Support Devices" in findings else "none seen."),
        "Lungs: " + (f"focal opacity on the {side}." if (side := findings.get("Lung Opacity")) else "clear."),
        "Pleura: " + ("; ".join(pleura) or "no fluid or air") + ".",
        "Heart: " + ("enlarged." if "Cardiomegaly" in findings else "normal size."),
    ]


def reading(phantom: Phantom) -> str:
    """The answer to the default prompt in NV-Reason's grammar."""
    walk = " ".join(["Technique: frontal view of a phantom.", *_walk(phantom.findings)])
    return f"<think> {walk} </think>\n<answer> {', '.join(phantom.labels)} </answer>"


def report(phantom: Phantom) -> str:
    """The answer to the follow-up `Write a structured report`."""
    return "\n".join(["**Findings**", *_walk(phantom.findings), "", "**Impression**", ", ".join(phantom.labels) + "."])


DIFFERENTIALS = {
    "Cardiomegaly": "a wide heart shadow, or magnification.",
    "Pleural Effusion": "free fluid, or a thick base.",
    "Pneumothorax": "air in the pleura, or a skin fold.",
    "Lung Opacity": "a focal density, or a nodule outside the lung.",
    "Support Devices": "a line, or a wire on the skin.",
    "No Finding": "nothing abnormal was drawn.",
}


def differentials(phantom: Phantom) -> str:
    """The answer to the follow-up `Provide differentials`."""
    return "\n".join(f"{label}: {DIFFERENTIALS[label]}" for label in phantom.labels)


FOLLOW_UPS = {"Write a structured report": report, "Provide differentials": differentials}


def png_files(count: int, seed: int, preset: str) -> Iterator[bytes]:
    """Phantoms as PNG files through a display preset, both photometrics in turn; a seed draws the same ones."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(draw(rng).picture(preset, PHOTOMETRICS[i % 2])).save(file, "PNG", compress_level=1)
        yield file.getvalue()
