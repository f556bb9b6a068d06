"""The verification gate: an engine bundle against the unquantized checkpoint in transformers; it fails closed.

Five parts, each of which has to pass: `files` (tokenizer, template, configs, profile and weights are the checkpoint's),
`vision` (image embeddings, token by token), `decoder` (next-token distributions on the reference's own text),
`readings` (what both say of the same images) and `controls` (occluded, blank and flipped images: the engine has to
react as the reference does). A part that raises, sees too few images or a number that is not finite has failed.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton import __version__
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.pipeline import Preprocessor, sampling_of
from cxr_triton.engines.verify.record import PARTS, SCHEMA, holds, require_verified, subject, write_record
from cxr_triton.engines.verify.thresholds import THRESHOLDS, thresholds_of
from cxr_triton.errors import CxrError, InvalidBundle, InvalidImage, InvalidRequest
from cxr_triton.pixels import image
from cxr_triton.profile import WINDOW_UNITS, ModelProfile, grids, load_profile, profile_names
from cxr_triton.reading import Parsed, parse
from cxr_triton.rewards import Sample, gold_of, rewards_for

if TYPE_CHECKING:
    from cxr_triton.engines.verify.reference import Answer, Case, Reference
    from cxr_triton.export.checkpoint import Checkpoint

__all__ = ["THRESHOLDS", "require_verified", "thresholds_of", "verify_bundle", "write_record"]

log = logging.getLogger(__name__)

CONTROLS = ("occluded", "blank", "flipped")
CONTROL_IMAGES = 16
SLOTS = 4
"""Sequences that the engine decodes together; also how many reference logits are in memory."""
EXACT_FILES = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json")
QUANTIZED = ("fp8", "int4-awq")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is."""


def verify_bundle(
    bundle: Bundle | str | Path,
    checkpoint: str | Path | Reference,
    profile: ModelProfile | None,
    images: Sequence[bytes | Path],
    *,
    thresholds: Mapping[str, float] | None = None,
    standin: Bundle | str | Path | None = None,
    quantized: str | Path | None = None,
    requests: Sequence[Mapping] = ({},),
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict:
    """Run the gate.

    Parameters
    ----------
    bundle : Bundle or path
    checkpoint : path or Reference
        The unquantized checkpoint, or an open reference on it, which is left open.
    profile : ModelProfile or None
        Profile of the reference; None takes the packaged one of the bundle's name. Never the bundle's own copy.
    images : sequence of bytes or Path
        DICOM, PNG or JPEG files.
    thresholds : mapping, optional
        Over the defaults of the bundle's precision; names as in `THRESHOLDS`.
    standin : Bundle or path, optional
        onnxruntime bundle of the same export source, run in place of an engine that cannot be loaded here.
    quantized : path, optional
        Folder of the quantized checkpoint that an ``fp8`` or ``int4-awq`` engine was exported from: the engine has to
        compute what that checkpoint says. Without it the decoder part of such an engine fails.
    requests : sequence of mapping
        REQUESTs of one image without history; image i is asked ``requests[i % len(requests)]``.
    limit, seed : int
        So many of the images, drawn with this seed.
    device : str
        Of the reference: ``auto``, ``cpu`` or ``cuda``.
    threads : int, optional
        CPU threads of the engine.
    progress : callable, optional

    Returns
    -------
    dict
        The record: `passed`, `parts`, `runtime`, `reference`, `thresholds`, `subject` and more; `details` holds every
        reading and is not written into a manifest. A failing gate is a record with ``passed`` false, not an error.

    Raises
    ------
    InvalidRequest, InvalidBundle, UnsupportedCheckpoint, InvalidProfile
        The question makes no sense: unknown thresholds, a damaged bundle, a checkpoint that the reference cannot read,
        or no image that it can. Images that it cannot read are left out, logged and counted.
    """
    from cxr_triton.engines.verify.reference import Case, Reference, request_json

    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    limits = thresholds_of(bundle.precision, bundle.geometry.compute, thresholds)
    runs, runtime = _runnable(bundle, standin)
    if not images:
        raise InvalidRequest("there is no image to verify on; give DICOM, PNG or JPEG radiographs")
    if isinstance(checkpoint, Reference):
        reference, own = checkpoint, False
    else:
        reference, own = Reference(checkpoint, profile or _packaged_profile(bundle), device=device), True
    say = progress or (lambda what, done, total: None)
    try:
        data, refused = _readable(_drawn(images, limit, seed), reference)
        cases = [Case(entry, request_json(requests[i % len(requests)])) for i, entry in enumerate(data)]
        gate = _Gate(bundle, runs, reference, cases, limits, quantized, threads, say)
        try:
            parts = {name: _run(getattr(gate, name)) for name in PARTS}
        finally:
            gate.close()
        return {
            "schema": SCHEMA,
            "passed": all(holds(part) for part in parts.values()),
            "subject": subject(bundle.manifest),
            "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "runtime": runtime,
            "reference": {**reference.facts, "files": reference.digests},
            "images": {
                "count": len(cases),
                "refused": refused,
                "seed": seed,
                "sha256": _digest_of(data),
                "requests": len(requests),
            },
            "thresholds": limits,
            "parts": parts,
            "versions": {"cxr_triton": __version__},
            "details": {
                "bundle": {key: bundle.manifest[key] for key in ("engine", "precision", "source")},
                "notice": reference.profile.notice,
                "title": reference.profile.title,
                "images": gate.details,
            },
        }
    finally:
        if own:
            reference.close()


def _packaged_profile(bundle: Bundle) -> ModelProfile:
    name = bundle.profile.name
    if name not in profile_names():
        raise InvalidRequest(
            f"the bundle's profile {name!r} is none that cxr-triton ships; name its file with --profile"
        )
    return load_profile(name)


def _drawn(images: Sequence, limit: int | None, seed: int) -> list:
    if limit is None or limit >= len(images):
        return list(images)
    chosen = np.random.default_rng(seed).choice(len(images), limit, replace=False)
    return [images[i] for i in sorted(chosen)]


def _readable(images: Sequence[bytes | Path], reference: Reference) -> tuple[list[bytes], dict[str, int]]:
    """Contents of the images that the reference can read, and how many of the others there are by code; logs each."""
    readable, refused = [], Counter()
    for number, entry in enumerate(images, 1):
        try:
            data = entry if isinstance(entry, bytes) else Path(entry).read_bytes()
            reference.picture(data)
            readable.append(data)
        except (InvalidImage, OSError) as error:
            code, said = (error.code, error.message) if isinstance(error, InvalidImage) else ("UNREADABLE", str(error))
            refused[code] += 1
            name = f"image {number}" if isinstance(entry, bytes) else repr(Path(entry).name)
            log.warning("%s is left out: [%s] %s", name, code, said)
    if not readable:
        codes = ", ".join(f"{count} {code}" for code, count in refused.items())
        raise InvalidRequest(f"there is no image to verify on (left out: {codes}); give DICOM, PNG or JPEG radiographs")
    return readable, dict(refused)


def _digest_of(data: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(entry).digest() for entry in data)).hexdigest()


def _runnable(bundle: Bundle, standin: Bundle | str | Path | None) -> tuple[Bundle, dict]:
    """The bundle whose sessions run here, and what the record says of it."""
    error = why_not_here(bundle)
    if error is None:
        return bundle, {"engine": bundle.engine, "standin": None}
    if standin is None:
        raise InvalidRequest(
            f"the {bundle.engine} engines in {bundle.path} cannot be run here ({error}); verify on a machine that runs "
            "them, or give an onnxruntime bundle of the same export with --standin"
        )
    standin = standin if isinstance(standin, Bundle) else Bundle.open(standin)
    if standin.engine != "onnxruntime":
        raise InvalidRequest(f"the stand-in in {standin.path} is for {standin.engine}, must be for onnxruntime")
    for what, mine, its in (
        ("source", bundle.manifest["source"], standin.manifest["source"]),
        ("precision", bundle.precision, standin.precision),
        ("head", bundle.manifest.get("head"), standin.manifest.get("head")),
        ("geometry", *({**dataclasses.asdict(b.geometry), "compute": None} for b in (bundle, standin))),
        *((name, *(b.manifest["files"].get(name) for b in (bundle, standin))) for name in _side_files(bundle)),
    ):
        if mine != its:
            raise InvalidRequest(
                f"the stand-in in {standin.path} has another {what}; build it from the same checkpoint"
            )
    said = f"{bundle.engine} cannot be run here ({error}); the same checkpoint was run in onnxruntime in its place"
    return standin, {"engine": "onnxruntime", "standin": subject(standin.manifest), "said": said}


def _side_files(bundle: Bundle) -> list[str]:
    return [name for name in bundle.manifest["files"] if not name.startswith(("vision.", "decoder.", "tensorrt_llm/"))]


def why_not_here(bundle: Bundle) -> str | None:
    """Why a bundle's engines cannot be run here; None if they can."""
    if bundle.engine == bundle.vision_engine == "onnxruntime":
        return None

    try:
        bundle.open_vision()
        bundle.open_decoder(slots=SLOTS)
    except CxrError as error:
        return error.message
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _run(part: Callable[[], dict]) -> dict:
    try:
        result = part()
    except ImportError:  # says nothing of the engine
        raise
    except Exception as error:
        log.debug("a part of the gate failed", exc_info=error)
        said = error.message if isinstance(error, CxrError) else f"{type(error).__name__}: {error}"
        return {"passed": False, "error": said[:500], "checks": [], "measured": {}}
    checks = result["checks"]
    passed = bool(checks) and all(check["passed"] for check in checks)
    return {"passed": passed, "error": None, "checks": checks, "measured": _finite(result["measured"])}


def _finite(value):
    """JSON has no NaN; what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


class _Gate:
    """The parts, each a method that gives measurements and checks."""

    def __init__(
        self,
        bundle: Bundle,
        runs: Bundle,
        reference: Reference,
        cases: list[Case],
        limits: dict[str, float],
        quantized: str | Path | None,
        threads: int | None,
        say: Progress,
    ):
        self.bundle, self.reference, self.cases, self.limits, self.say = bundle, reference, cases, limits, say
        self._runs, self._threads, self._quantized = runs, threads, quantized
        self.answers = reference.read(cases, _counter(say, "reference reads", len(cases)))
        self.said: list[_Said] | None = None
        self.details = [
            {
                "sha256": hashlib.sha256(case.image).hexdigest(),
                "request": json.loads(case.request),
                "reference": {"text": answer.text, "tokens": len(answer.ids), "finish_reason": answer.finish_reason},
            }
            for case, answer in zip(cases, self.answers, strict=True)
        ]

    @functools.cached_property
    def engine(self) -> _Engine:
        """Opened by the first part that needs it, so that what cannot be opened fails its parts."""
        return _Engine(self._runs, self._threads)

    def close(self) -> None:
        if "engine" in self.__dict__:
            self.engine.close()

    def check(self, name: str, value: float, what: str = "") -> dict:
        """One measurement against its threshold; a value that is not finite fails."""
        limit, value = self.limits[name], float(value) + 0.0  # no minus zero
        passed = math.isfinite(value) and (value >= limit if THRESHOLDS[name].at_least else value <= limit)
        at_least = THRESHOLDS[name].at_least
        return {
            "name": name + (f", {what}" if what else ""),
            "value": value if math.isfinite(value) else None,
            "limit": limit,
            "at_least": at_least,
            "passed": bool(passed),
        }

    def files(self) -> dict:
        """Everything around the weights is the checkpoint's and the named profile's."""
        bundle, source, profile = self.bundle, self.reference.source, self.reference.profile
        checks, expected = [], source.side_files()
        for name in EXACT_FILES:
            same = (bundle.path / name).read_bytes() == expected[name]
            checks.append(_fact(name, same, "is not byte for byte the checkpoint's"))
        checks.append(_fact("config.json", self._same_config(expected["config.json"]), "describes another model"))
        own = dataclasses.asdict(bundle.profile)
        wanted = {**dataclasses.asdict(profile), "max_sequence": bundle.profile.max_sequence}
        differing = sorted(key for key in wanted if own[key] != wanted[key])
        said = ", ".join(f"{key} is {own[key]!r:.60}, expected {wanted[key]!r:.60}" for key in differing)
        checks.append(_fact("profile.yaml", not differing, said))
        geometry, text = bundle.geometry, source.text
        facts = {
            "hidden": text.hidden_size,
            "layers": text.num_hidden_layers,
            "kv_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "vocab": text.vocab_size,
            "window_budget": profile.window_budget,
            "token_budget": profile.token_budget,
            "image_token_id": source.image_token_id,
            "eos_token_ids": source.eos_token_ids,
            "vision_start_token_id": source.vision_start_token_id,
            "merge_size": source.vision.spatial_merge_size,
        }
        differing = [key for key, value in facts.items() if getattr(geometry, key) != value]
        checks.append(_fact("geometry", not differing, f"{', '.join(differing)} differ from the checkpoint's"))
        checks.append(_fact("weights", *self._same_weights()))
        return {"checks": checks, "measured": {}}

    def _same_config(self, expected: bytes) -> bool:
        own = (self.bundle.path / "config.json").read_bytes()
        if own == expected:
            return True
        if self.bundle.precision not in QUANTIZED:
            return False
        from cxr_triton.export.checkpoint import read_config

        # A quantizer writes the config anew; what it describes has to stay.
        mine, its = json.loads(own), json.loads(expected)
        ids = ("image_token_id", "vision_start_token_id", "vision_end_token_id", "model_type")
        return read_config(mine) == read_config(its) and all(mine.get(key) == its.get(key) for key in ids)

    def _same_weights(self) -> tuple[bool, str]:
        """The bundle's source is the reference's checkpoint, or was quantized from it."""
        source = self.bundle.manifest["source"]
        if self.bundle.precision in QUANTIZED:
            calibration = source.get("calibration")
            source = calibration.get("source") if isinstance(calibration, dict) else None
        files = source.get("files") if isinstance(source, dict) else None
        if not isinstance(files, dict) or not files:
            return False, "the manifest does not say from which weights the engine was made; export again"
        weights = {name: digest for name, digest in self.reference.digests.items() if name.endswith(".safetensors")}
        made = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
        return made == weights, "the engine was made from other weights than the reference's"

    def vision(self) -> dict:
        """Image embeddings of the images, end to end, and of every aspect ratio bucket."""
        cosines, norms, measured = [], [], {}
        buckets = _buckets(self.reference.profile)
        tick = _counter(self.say, "vision", len(self.cases) + len(buckets))
        for case, detail in zip(self.cases, self.details, strict=True):
            ours, theirs = self.engine.embeddings(case), self.reference.embeddings(case)
            cosine, norm = _compare_rows(ours, theirs)
            detail["vision_cosine"], detail["vision_cosine_min"] = _finite([cosine.mean(), cosine.min()])
            cosines.append(cosine)
            norms.append(norm)
            tick(1)
        measured["images"] = _cosine_summary(cosines, norms)
        for i, (name, (rows, cols)) in enumerate(buckets.items()):
            pixels = self.reference.picture(self.cases[i % len(self.cases)].image)
            pixels = image.resize(pixels, (rows * _UNIT, cols * _UNIT))
            cosine, norm = _compare_rows(self.engine.encode(pixels), self.reference.encode(pixels, resize=False))
            measured[name] = {"grid": [rows, cols], **_cosine_summary([cosine], [norm])}
            cosines.append(cosine)
            norms.append(norm)
            tick(1)
        every = np.concatenate(cosines)
        measured["tokens"] = len(every)
        measured["histogram"] = _histogram(np.maximum(1 - every, 1e-9), -9, 0)
        checks = [
            self.check("vision_cosine", every.mean()),
            self.check("vision_cosine_min", every.min()),
            self.check("vision_norm", max(norms) if np.isfinite(norms).all() else math.nan),
        ]
        return {"checks": checks, "measured": measured}

    def decoder(self) -> dict:
        """Next-token distributions on the reference's text, with the engine's image embeddings and the reference's.

        And with the reference's embeddings against a reference that holds the weights as the engine stores them: that
        shows a fault of the engine which is smaller than what quantization does, or which the text does not show.
        """
        measured, checks = {}, []
        tick = _counter(self.say, "decoder", 3 * len(self.cases))
        for whose, embed in (("engine", self.engine.embeddings), ("reference", self.reference.embeddings)):
            agreements, divergences = [], []
            for i, ours, theirs in self._forced(embed, tick):
                agrees = ours.argmax(-1) == theirs.argmax(-1)
                kl = np.array([kl_divergence(its, mine) for its, mine in zip(theirs, ours, strict=True)])
                self.details[i][f"top1_{whose}"], self.details[i][f"kl_{whose}"] = _finite([agrees.mean(), kl.mean()])
                agreements.append(agrees)
                divergences.append(kl)
            agrees, kl = np.concatenate(agreements), np.concatenate(divergences)
            name = f"{whose}'s embeddings"
            measured[name] = {
                "tokens": len(kl),
                "top1_agreement": agrees.mean(),
                "kl_mean": kl.mean(),
                "kl_max": kl.max(),
                "kl_p99": np.quantile(kl, 0.99),
                "histogram": _histogram(np.maximum(kl, 1e-9), -9, 2),
            }
            checks.append(self.check("top1_agreement", agrees.mean(), name))
            checks.append(self.check("kl", kl.mean(), name))
        head = self.bundle.manifest.get("head") or "compute"
        with self.reference.storing(self._stored(), self.bundle.precision, head):
            forced = self._forced(self.reference.embeddings, tick)
            errors = np.concatenate([logit_error(theirs, ours) for _, ours, theirs in forced])
        measured["stored weights"] = {
            "tokens": len(errors),
            "logit_error": errors.mean(),
            "logit_error_max": errors.max(),
            "histogram": _histogram(np.maximum(errors, 1e-9), -9, 1),
        }
        checks.append(self.check("logit_error", errors.mean()))
        return {"checks": checks, "measured": measured}

    def _forced(self, embed, tick) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each case its index, and the engine's and the reference's logits (A, vocab) on the reference's text."""
        for at in range(0, len(self.cases), SLOTS):
            chunk = range(at, min(at + SLOTS, len(self.cases)))
            prompts = [self.reference.prompt(self.cases[i]) for i in chunk]
            given = [embed(self.cases[i]) for i in chunk]
            scored = self.engine.forced(prompts, given, [self.answers[i].ids for i in chunk])
            for i, ours in zip(chunk, scored, strict=True):
                yield i, ours, self.reference.logits(self.cases[i])
                tick(1)

    def _stored(self) -> Checkpoint:
        """The checkpoint that the engine was exported from."""
        if self.bundle.precision not in QUANTIZED:
            return self.reference.source
        from cxr_triton.export.checkpoint import Checkpoint

        if self._quantized is None:
            raise InvalidRequest("the engine was made of a quantized checkpoint; name its folder with --quantized")
        stored = Checkpoint(self._quantized)
        if stored.digests() != self.bundle.manifest["source"].get("files"):
            raise InvalidRequest(f"{self._quantized} is not the quantized checkpoint that the engine was made of")
        return stored

    def readings(self) -> dict:
        """What both say of the same images."""
        said = self._said()
        reference = [self._parsed(case, answer) for case, answer in zip(self.cases, self.answers, strict=True)]
        checks, measured = [self.check("images", len(said))], {}
        sets, prose, rewards = [], [], {}
        for detail, ours, theirs, answer in zip(self.details, said, reference, self.answers, strict=True):
            kind, grammar = ours.answer, ours.grammar
            agreement = agreement_of(kind, ours.parsed, theirs)
            (prose if kind in ("prose", "text") else sets).append(agreement)
            gold = gold_of(answer.text, grammar)
            for name, reward in rewards_for(grammar, kind).items():
                labels = self.reference.profile.labels
                pair = [
                    reward(Sample(text=text, gold=gold, tokens=tokens, labels=labels))
                    for text, tokens in ((answer.text, len(answer.ids)), (ours.text, ours.tokens))
                ]
                rewards.setdefault(name, []).append(pair)
                detail.setdefault("rewards", {})[name] = _finite(pair)
            detail["engine"] = {"text": ours.text, "tokens": ours.tokens, "finish_reason": ours.finish_reason}
            detail["agreement"] = agreement
            for whose, parsed in (("engine", ours.parsed), ("reference", theirs)):
                detail[whose] |= {"status": parsed.status, "says": _says(kind, parsed)}
        if sets:
            checks.append(self.check("label_iou", np.mean(sets)))
        if prose:
            checks.append(self.check("prose_f1", np.mean(prose)))
        flips = _flips([entry.parsed for entry in said], reference, self.reference.profile.labels)
        measured["labels"] = flips
        if flips:
            checks.append(self.check("label_flips", max(flip["flips"] for flip in flips.values()) / len(said)))
        for name, threshold, sign in (
            ("ok", "format_drop", -1),
            ("truncated", "truncated_rise", 1),
            ("out_of_vocabulary", "unknown_rise", 1),
        ):
            pair = [np.mean([p.status == name for p in group]) for group in (reference, [s.parsed for s in said])]
            measured[name] = {"reference": pair[0], "engine": pair[1]}
            checks.append(self.check(threshold, sign * (pair[1] - pair[0])))
        lengths = [np.mean([len(a.ids) for a in self.answers]), np.mean([entry.tokens for entry in said])]
        measured["tokens"] = {"reference": lengths[0], "engine": lengths[1]}
        checks.append(self.check("length_drift", abs(lengths[1] / lengths[0] - 1) if lengths[0] else math.nan))
        measured["identical"] = np.mean([s.text == a.text for s, a in zip(said, self.answers, strict=True)])
        means = {name: np.mean(pairs, axis=0) for name, pairs in rewards.items()}
        measured["rewards"] = {name: {"reference": mean[0], "engine": mean[1]} for name, mean in means.items()}
        if means:
            checks.append(self.check("reward_drop", max(mean[0] - mean[1] for mean in means.values())))
        return {"checks": checks, "measured": measured}

    def controls(self) -> dict:
        """Occluded, blank and flipped images: answers change as the reference's do, and to the same where one sees."""
        from cxr_triton.engines.verify.reference import Case

        chosen = range(min(len(self.cases), CONTROL_IMAGES))
        said = self._said()
        measured, worst, reactions = {}, [], []
        for control in CONTROLS:
            cases = [
                Case(_control(control, self.reference.picture(self.cases[i].image)), self.cases[i].request)
                for i in chosen
            ]
            theirs = self.reference.read(cases, _counter(self.say, f"reference reads {control}", len(cases)))
            ours = self.engine.read(cases, self.reference.profile, _counter(self.say, control, len(cases)))
            agreements, changes = [], []
            for i, case, answer, entry in zip(chosen, cases, theirs, ours, strict=True):
                before = self._parsed(self.cases[i], self.answers[i])
                after = self._parsed(case, answer)
                kind = entry.answer
                agreements.append(agreement_of(kind, entry.parsed, after))
                changes.append(
                    (1 - agreement_of(kind, after, before), 1 - agreement_of(kind, entry.parsed, said[i].parsed))
                )
                self.details[i].setdefault("controls", {})[control] = {
                    "reference": {"status": after.status, "says": _says(kind, after)},
                    "engine": {"status": entry.parsed.status, "says": _says(kind, entry.parsed)},
                    "agreement": agreements[-1],
                }
            change = np.array(changes)
            measured[control] = {
                "images": len(cases),
                "agreement": np.mean(agreements),
                "change_reference": change[:, 0].mean(),
                "change_engine": change[:, 1].mean(),
                "change_difference": np.abs(change[:, 0] - change[:, 1]).mean(),
            }
            if (
                control != "blank"
            ):  # no right answer exists there, so two models may well differ; both must change theirs
                worst.append(np.mean(agreements))
            reactions.append(np.abs(change[:, 0] - change[:, 1]).mean())
        checks = [self.check("control_iou", min(worst)), self.check("control_reaction", max(reactions))]
        return {"checks": checks, "measured": measured}

    def _said(self) -> list[_Said]:
        if self.said is None:
            count = _counter(self.say, "engine reads", len(self.cases))
            self.said = self.engine.read(self.cases, self.reference.profile, count)
        return self.said

    def _parsed(self, case: Case, answer: Answer) -> Parsed:
        asked = self.reference.asked(case)
        return parse_answer(answer.text, answer.finish_reason, asked.grammar, asked.answer, self.reference.profile)


@dataclass(frozen=True, eq=False)
class _Said:
    """An engine's answer."""

    text: str
    tokens: int
    finish_reason: str
    grammar: str
    answer: str
    parsed: Parsed


class _Engine:
    """The sessions of a bundle that runs here, driven as the served models drive them."""

    def __init__(self, bundle: Bundle, threads: int | None):

        self.bundle = bundle
        self._preprocessor = Preprocessor(bundle.path, not_a_chest="flag")  # the controls are no chests
        self._vision = bundle.open_vision(threads=threads)
        self._decoder = bundle.open_decoder(slots=SLOTS, threads=threads)
        self._prepared: dict = {}

    def close(self) -> None:
        self._preprocessor.close()

    def embeddings(self, case: Case) -> np.ndarray:
        """(T, hidden) float32 image embeddings of a case through the bundle's own preprocessing."""
        return self._prepare(case)[1]

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(T, hidden) float32 image embeddings of a picture that needs no resize."""
        geometry = self.bundle.geometry
        vision = image.windows(pixels, window_budget=geometry.window_budget, token_budget=geometry.token_budget)
        return self._vision.encode(**image.stack([vision]))[0, : vision.tokens]

    def _prepare(self, case: Case):
        """Step tensors and (T, hidden) embeddings of a case."""
        if case.key not in self._prepared:
            step = self._preprocessor.prepare([case.image], case.request)
            inputs = {n: getattr(step, n) for n in ("pixel_windows", "patch_rows_cols", "valid", "merge_order")}
            rows = self._vision.encode(**inputs)[0]
            self._prepared[case.key] = step, np.array(rows[: int((step.image_index >= 0).sum())])
        return self._prepared[case.key]

    def read(self, cases: Sequence[Case], profile: ModelProfile, count: Callable[[int], None]) -> list[_Said]:
        """The engine's answers through the decoder runtime, `SLOTS` at a time."""
        from cxr_triton.engines.runtime.scheduler import DecoderRuntime
        from cxr_triton.engines.runtime.stream import Generation

        receivers = []
        with DecoderRuntime(self.bundle, session=self._decoder, queue_size=len(cases)) as runtime:
            for case in cases:
                step, embeddings = self._prepare(case)
                generation = Generation(
                    input_ids=step.input_ids,
                    position_ids=step.position_ids,
                    image_index=step.image_index,
                    image_embeddings=embeddings,
                    sampling=sampling_of(step.context),
                )
                receivers.append((json.loads(step.context), _Receiver(count)))
                runtime.submit(generation, receivers[-1][1])
            for _, receiver in receivers:
                receiver.done.wait()
        said = []
        for context, receiver in receivers:
            if receiver.error is not None:
                raise receiver.error
            done = receiver.completion
            parsed = parse_answer(done.text, done.finish_reason, context["grammar"], context["answer"], profile)
            tokens = done.usage["completion_tokens"]
            said.append(_Said(done.text, tokens, done.finish_reason, context["grammar"], context["answer"], parsed))
        return said

    def forced(self, prompts, embeddings, answers) -> list[np.ndarray]:
        """Logits with which each token of given answers is predicted: prefill, then one step a token, as in serving.

        Parameters
        ----------
        prompts : sequence of Prompt
            At most `SLOTS`, as of the others.
        embeddings : sequence of (T, hidden) float32 array
        answers : sequence of (A,) int64 array

        Returns
        -------
        list of (A, vocab) float32 array
        """
        # The longest first: a step runs the first slots, so the answers that still go on have to be these.
        order = sorted(range(len(answers)), key=lambda i: -len(answers[i]))
        session = self._decoder
        results = [np.empty((len(ids), session.vocab), np.float32) for ids in answers]
        try:
            for slot, i in enumerate(order):
                prompt, rows = prompts[i], max(len(embeddings[i]), 1)
                inputs = prompt.input_ids, prompt.image_index(rows), embeddings[i], prompt.position_ids
                results[i][0] = session.prefill(slot, *inputs, is_last=True)
            for t in range(1, max(len(ids) for ids in answers)):
                active = [i for i in order if len(answers[i]) > t]
                tokens = np.array([answers[i][t - 1] for i in active], np.int64)
                positions = np.array([int(prompts[i].position_ids.max()) + t for i in active], np.int64)
                for row, i in zip(session.step(tokens, positions), active, strict=True):
                    results[i][t] = row
        finally:
            for slot in range(SLOTS):
                session.free(slot)
        return results


class _Receiver:
    """Waits for the end of a stream."""

    def __init__(self, count: Callable[[int], None]):
        self.done, self.completion, self.error, self._count = threading.Event(), None, None, count

    def __call__(self, chunk) -> None:
        if chunk.completion or chunk.error:
            self.completion, self.error = chunk.completion, chunk.error
            self._count(1)
            self.done.set()


# Measures.

_UNIT = image.PATCH * image.MERGE


def kl_divergence(reference: np.ndarray, engine: np.ndarray) -> float:
    """KL(reference || engine) of two rows of logits in nats, in float64; NaN where the engine's are not finite."""
    p, q = (_log_softmax(row.astype(np.float64)) for row in (reference, engine))
    if not np.isfinite(q).all():
        return math.nan
    return max(float(np.sum(np.exp(p) * (p - q))), 0.0)


def logit_error(reference: np.ndarray, engine: np.ndarray) -> np.ndarray:
    """Relative distance of logits (A, vocab), token by token, each less its mean, which a softmax does not see."""
    theirs, ours = (rows.astype(np.float64) - rows.mean(-1, keepdims=True) for rows in (reference, engine))
    with np.errstate(all="ignore"):
        return np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)


def _log_softmax(row: np.ndarray) -> np.ndarray:
    row = row - row.max()
    return row - np.log(np.exp(row).sum())


def _compare_rows(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, float]:
    """Cosine of each token, and the relative error of the root mean square; NaN where a token is zero or not finite."""
    if ours.shape != theirs.shape:
        raise InvalidBundle(f"the engine gives {ours.shape} image embeddings, the reference {theirs.shape}")
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    with np.errstate(all="ignore"):
        cosine = (ours * theirs).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1))
        norm = (
            abs(math.sqrt((ours**2).mean()) / math.sqrt((theirs**2).mean()) - 1)
            if np.isfinite(ours).all()
            else math.nan
        )
    return cosine, float(norm)


def _cosine_summary(cosines: list[np.ndarray], norms: list[float]) -> dict:
    every = np.concatenate(cosines)
    return {"cosine": every.mean(), "cosine_min": every.min(), "norm_error": float(np.max(norms))}


def _buckets(profile: ModelProfile) -> dict[str, tuple[int, int]]:
    """A grid in merge units, rows and columns, for each kind of aspect ratio that the profile's resize can give."""
    possible = grids(profile.min_pixels, profile.max_pixels, profile.max_aspect_ratio)
    upright = {
        "smallest": min(possible, key=lambda g: (g[0] * g[1], g[1])),
        "square": max((g for g in possible if g[0] == g[1]), key=lambda g: g[0], default=possible[0]),
        "fills the budget": max(possible, key=lambda g: (g[0] * g[1], g[0])),
        "extreme": max(possible, key=lambda g: (g[1] / g[0], g[1])),
        "oblong": min(possible, key=lambda g: (abs(g[1] / g[0] - 1.4), -g[0] * g[1])),
        "edge windows": max(
            (g for g in possible if g[0] % WINDOW_UNITS and g[1] % WINDOW_UNITS),
            key=lambda g: g[0] * g[1],
            default=possible[0],
        ),
    }
    named = {}
    for name, (rows, cols) in upright.items():
        if rows == cols:
            named[name] = (rows, cols)
        else:
            named[f"{name}, wide"], named[f"{name}, tall"] = (rows, cols), (cols, rows)
    return named


def _control(kind: str, picture: np.ndarray) -> bytes:
    """PNG of a picture with its middle covered, without content (faint noise: a constant is refused), or mirrored."""
    from cxr_triton.engines.verify.reference import png

    changed = np.array(picture)
    grey = np.uint8(round(float(picture.mean())))
    rows, cols = picture.shape[:2]
    if kind == "occluded":
        changed[rows // 5 : rows - rows // 5, cols // 5 : cols - cols // 5] = grey
    elif kind == "blank":
        noise = np.random.default_rng(0).integers(-2, 3, (rows, cols) + (1,) * (changed.ndim - 2))
        changed[:] = np.clip(int(grey) + noise, 0, 255)
    else:
        changed = np.ascontiguousarray(changed[:, ::-1])
    return png(changed)


def parse_answer(text: str, finish_reason: str, grammar: str, answer: str, profile: ModelProfile) -> Parsed:
    labels = profile.labels if answer in ("labels", "text") else ()
    return parse(
        text, grammar=grammar, answer=answer, labels=labels, finish_reason=finish_reason, image_sizes=[(100, 100)]
    )


def agreement_of(kind: str, ours: Parsed, theirs: Parsed) -> float:
    """How far two answers agree, 0 to 1: sets of labels or options, first boxes, or words."""
    if kind in ("prose", "text"):
        return _word_f1(ours.answer or ours.text, theirs.answer or theirs.text)
    if kind == "boxes":
        from cxr_triton.rewards import box_iou

        if not ours.boxes or not theirs.boxes:
            return float(not ours.boxes and not theirs.boxes and ours.status == theirs.status)
        if ours.boxes[0].percent == theirs.boxes[0].percent:  # equal even where they are no box, as (90,0),(10,5)
            return 1.0
        return box_iou(ours.boxes[0].percent, theirs.boxes[0].percent)
    mine, its = (set(_says(kind, parsed)) for parsed in (ours, theirs))
    if not mine and not its:  # both lists may be empty for different reasons
        return float(ours.status == theirs.status)
    return len(mine & its) / len(mine | its)


def _says(kind: str, parsed: Parsed) -> list[str]:
    """The answer in short."""
    if kind == "labels":
        return [*(finding.label for finding in parsed.findings), *parsed.unknown_labels]
    if kind == "option":
        return list(parsed.options)
    if kind == "boxes":
        return [f"{box.label or 'unnamed'} {' '.join(f'{v:g}' for v in box.percent)}" for box in parsed.boxes]
    return [parsed.answer or ""]


def _word_f1(a: str, b: str) -> float:
    mine, its = (Counter(text.casefold().split()) for text in (a, b))
    if not mine or not its:
        return float(mine == its)
    return 2 * (mine & its).total() / (mine.total() + its.total())


def _flips(ours: list[Parsed], theirs: list[Parsed], labels: Sequence[str]) -> dict[str, dict]:
    """Of each label that either side gave: on how many images each gave it, and on how many only one did."""
    given = [[{f.label for f in p.findings} for p in group] for group in (ours, theirs)]
    table = {}
    for label in labels:
        pairs = [(label in mine, label in its) for mine, its in zip(*given, strict=True)]
        if any(a or b for a, b in pairs):
            table[label] = {
                "engine": sum(a for a, _ in pairs),
                "reference": sum(b for _, b in pairs),
                "flips": sum(a != b for a, b in pairs),
            }
    return table


def _histogram(values: np.ndarray, low: int, high: int) -> dict:
    """Counts by powers of ten, from 10**low to 10**high."""
    values = values[np.isfinite(values)]
    counts, _ = np.histogram(np.clip(np.log10(values), low, high - 1e-9), bins=high - low, range=(low, high))
    return {"log10_from": low, "log10_to": high, "counts": counts.tolist()}


def _fact(name: str, holds: bool, otherwise: str) -> dict:
    return {"name": name, "passed": bool(holds), "said": None if holds else otherwise}


def _counter(say: Progress, what: str, total: int) -> Callable[[int], None]:
    done = 0
    say(what, 0, total)

    def count(more: int) -> None:
        nonlocal done
        done += more
        say(what, done, total)

    return count
