"""Steps `prepare` and `providers`: the models are made, and small engines agree with a CPU."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.perf.gpu_session.machine import OPTIONAL, importable
from cxr_triton.perf.gpu_session.session import CPU, GPU, Session, cosines, pictures

if TYPE_CHECKING:
    from cxr_triton.engines.bundle import Bundle


def prepare(session: Session) -> None:
    """Checkpoints, exports and bundles, those of each scale and precision in a process of their own."""
    makers = {}
    for scale in session.scales:
        for precision in session.precisions:
            command = [sys.executable, "-m", "cxr_triton.perf.gpu_session", "bundle", scale, precision]
            makers[scale, precision] = subprocess.Popen([*command, *session.arguments])
    started_s = time.perf_counter()
    for (scale, precision), maker in makers.items():
        with session.noting("prepare", scale=scale, precision=precision) as row:
            row["ok"] = maker.wait() == 0
            row["since_start_s"] = round(time.perf_counter() - started_s, 2)


def providers(session: Session) -> None:
    """Small engines load, run and agree with the same weights on a CPU in fp32, or say why not."""
    small = session.scales["small"]
    others = [engine for engine, module in OPTIONAL.items() if not session.is_dry and importable(module)[0]]
    for precision in session.precisions:
        expected = _probe(session, session.bundle(small, precision, CPU))
        for engine in (GPU, *others):
            with session.noting("providers", engine=engine, precision=precision) as row:
                row.update(_agreement(expected, _probe(session, session.bundle(small, precision, engine))))


def _probe(session: Session, bundle: Bundle) -> dict[str, np.ndarray]:
    """Image embeddings of two pictures, logits of a prompt in two pieces and of three steps after it."""
    vision, decoder = session.vision(bundle), session.decoder(bundle, 3)
    rng = np.random.default_rng(0)
    embeddings = vision.encode(**pictures(bundle.geometry, 2))
    ids, index = rng.integers(1000, 100_000, 24), np.full(24, -1, np.int64)
    index[4:20] = np.arange(16)
    positions = np.tile(np.arange(24), (3, 1))
    positions[1:, 4:20] = 4 + np.stack([np.arange(16) // 4, np.arange(16) % 4])
    logits = []
    for slot in range(3):
        for piece in (slice(0, 10), slice(10, 24)):
            found = decoder.prefill(
                slot, ids[piece], index[piece], embeddings[0], positions[:, piece], is_last=piece.stop == 24
            )
        logits.append(found.copy())
    for streams in (1, 3, 2):
        tokens, at = np.arange(streams) + 2000, decoder.lengths[:streams].copy()
        logits += [row.copy() for row in decoder.step(tokens, at)]
    return {"embeddings": embeddings[:, :16], "logits": np.stack(logits)}


def _agreement(expected: dict, found: dict) -> dict:
    """Least cosine of any row; bf16 of random weights stays over 0.99."""
    told = {f"{name}_cosine": float(cosines(values, found[name]).min()) for name, values in expected.items()}
    return told | {"agrees": all(np.isfinite(v) and v > 0.99 for v in told.values())}
