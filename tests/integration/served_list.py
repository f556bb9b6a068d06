"""What every engine behind the real Triton is asked: the demonstration model with tasks of more forms, and its native
decoder on the same images, whose answers are the expected ones."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import yaml

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
SHORT = {"max_new_tokens": 10, "temperature": 0.0}
MORE_TASKS = {
    "compare": {
        "prompt": "Compare them.",
        "answer": "text",
        "description": "Two images.",
        "min_images": 2,
        "max_images": 2,
    },
    "quiz": {
        "prompt": "Find abnormalities.",
        "answer": "text",
        "description": "No image.",
        "min_images": 0,
        "max_images": 0,
    },
}
HISTORY = [
    {"role": "user", "content": "Find abnormalities and support devices."},
    {"role": "assistant", "content": "<think>The heart is large.</think><answer>Cardiomegaly</answer>"},
]


def profile_with_tasks(folder: Path):
    """The demonstration model's profile, with tasks for two images and for none."""
    from cxr_triton.profile import load_profile

    profile = yaml.safe_load((PHANTOM / "profile.yaml").read_text())
    profile["tasks"] |= MORE_TASKS
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile))
    return load_profile(folder / "profile.yaml")


def dicom_files(count: int) -> list[bytes]:
    """Phantoms that the model was not trained on."""
    import evaluate

    from cxr_triton import phantom_file

    return [phantom_file.write_dicom(phantom) for phantom in evaluate.held_out(count)]


def forms(files: list[bytes]) -> list[tuple[list[bytes], dict]]:
    """Images and REQUEST of a text alone, of two images, and of a follow-up turn."""
    return [
        ([], {"task": "quiz"}),
        (files[1:3], {"task": "compare"}),
        (files[2:3], {"task": "differentials", "history": HISTORY}),
    ]


class Native:
    """The native decoder of an export in fp32; a context manager.

    Parameters
    ----------
    export : Path
    folder : Path
        For its bundle.
    rounded : bool
        Rows of images are rounded to bf16, for an engine that is given them so.
    """

    def __init__(self, export: Path, folder: Path, *, rounded: bool):
        from cxr_triton.engines.build import build_bundle
        from cxr_triton.engines.onnxruntime.session import OrtVision
        from cxr_triton.engines.pipeline import Preprocessor
        from cxr_triton.engines.runtime.scheduler import DecoderRuntime

        bundle = build_bundle(export, folder / "bundle")
        self._vision, self._preprocessor = OrtVision(bundle, threads=1), Preprocessor(bundle.path)
        self._runtime, self._rounded = DecoderRuntime(bundle, threads=1), rounded

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._runtime.close()
        self._preprocessor.close()

    def __call__(self, images, **asked):
        """The completion of a request, or the error that it ends with."""
        from cxr_triton.engines.pipeline import sampling_of
        from cxr_triton.engines.runtime.stream import Generation

        done, completions = threading.Event(), []

        def hear(chunk):
            if chunk.completion or chunk.error:
                completions.append(chunk.completion or chunk.error)
                done.set()

        step = self._preprocessor.prepare(images, json.dumps(asked))
        rows = self._vision.encode(step.pixel_windows, step.patch_rows_cols, step.valid, step.merge_order)
        if self._rounded:
            rows = rows.astype(ml_dtypes.bfloat16).astype(np.float32)
        generation = Generation(
            input_ids=step.input_ids,
            position_ids=step.position_ids,
            image_index=step.image_index,
            image_embeddings=rows.reshape(-1, rows.shape[-1]),
            sampling=sampling_of(step.context),
        )
        self._runtime.submit(generation, hear)
        assert done.wait(600)
        return completions[0]
