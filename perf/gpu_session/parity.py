"""Step `parity`: both graphs against transformers on the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.perf.gpu_session.session import Session, cosines

if TYPE_CHECKING:
    from cxr_triton.engines.bundle import Bundle

ANSWER = 24


def parity(session: Session) -> None:
    """Both graphs against transformers on the same weights, on the GPU, for each size and precision."""
    from cxr_triton.engines.verify.reference import Reference
    from cxr_triton.export.checkpoint import Checkpoint
    from cxr_triton.profile import load_profile

    for scale in session.scales.values():
        with Reference(session.checkpoint(scale), load_profile("nv-reason-cxr-3b")) as reference:
            for precision in session.precisions:
                with session.noting("parity", scale=scale.name, precision=precision) as row:
                    bundle, weights = session.bundle(scale, precision), reference.source
                    if precision == "int4-awq":
                        weights = Checkpoint(session.checkpoint(scale, precision))
                    head = "int4" if precision.startswith("int4") else "compute"
                    with reference.storing(weights, precision, head):
                        # Of a quantized checkpoint, which is drawn anew, the reference has the decoder only.
                        row.update(_parity(session, bundle, reference, with_picture=precision != "int4-awq"))


def _parity(session: Session, bundle: Bundle, reference, *, with_picture: bool) -> dict:
    """Cosines of image embeddings and of logits after a prompt and each token of a given answer."""
    from cxr_triton.chat import ChatTokenizer
    from cxr_triton.pixels import image

    geometry, rng, told = bundle.geometry, np.random.default_rng(3), {}
    picture, embeddings = None, np.zeros((0, geometry.hidden), np.float32)
    parts = [{"type": "text", "text": "Is there a pneumothorax? " * 40}]
    if with_picture:
        picture = rng.integers(0, 256, (448, 476), np.uint8)
        windows = image.windows(picture, window_budget=geometry.window_budget, token_budget=geometry.token_budget)
        embeddings = session.vision(bundle).encode(**image.stack([windows]))[0]
        expected = reference.encode(picture, resize=False)
        told["embeddings_cosine"] = float(cosines(expected, embeddings[: len(expected)]).min())
        parts.insert(0, {"type": "image"})
    grids = [(448 // 14, 476 // 14)] * with_picture
    prompt = ChatTokenizer(bundle.path).encode([{"role": "user", "content": parts}], grids)
    answer = rng.integers(1000, 100_000, ANSWER)
    tokens = len(prompt.input_ids)
    decoder, index = session.decoder(bundle, 1), prompt.image_index(geometry.token_budget)
    for start in range(0, tokens, 200):
        piece, is_last = slice(start, start + 200), start + 200 >= tokens
        rows = decoder.prefill(
            0, prompt.input_ids[piece], index[piece], embeddings, prompt.position_ids[:, piece], is_last=is_last
        )
    found = [rows.copy()]
    for number, token in enumerate(answer):
        found.append(decoder.step(np.array([token]), np.array([tokens + prompt.delta + number]))[0].copy())
    expected = reference.forced(np.concatenate([prompt.input_ids, answer]), picture, ANSWER + 1)
    of_logits, same = cosines(expected, np.stack(found)), expected.argmax(1) == np.stack(found).argmax(1)
    told |= {
        "prompt_tokens": tokens,
        "logits_cosine": float(of_logits.min()),
        "logits_cosine_mean": float(of_logits.mean()),
    }
    return told | {"same_token_share": float(same.mean()), "ok": bool(of_logits.min() > 0.99)}
