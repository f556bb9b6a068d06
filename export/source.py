"""Where a checkpoint comes from, a folder or the Hugging Face hub, its licence, and whether a profile fits it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cxr_triton.errors import LicenceNotAccepted, UnsupportedCheckpoint
from cxr_triton.export.checkpoint import FILES, Checkpoint
from cxr_triton.profile import CheckpointShape, Licence, ModelProfile, load_profile, profile_names

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A checkpoint that may be used.

    Attributes
    ----------
    name : str
        Hub id, or a folder's name.
    revision : str or None
        Commit of a hub id.
    checkpoint : Checkpoint
    licence : Licence
    accepted : bool
        The user accepts it.
    """

    name: str
    revision: str | None
    checkpoint: Checkpoint
    licence: Licence
    accepted: bool

    def record(self) -> dict:
        """``source`` of what is made of it: name, revision, digests of its files, licence."""
        return {
            "name": self.name,
            "revision": self.revision,
            "files": self.checkpoint.digests(),
            "licence": {**dataclasses.asdict(self.licence), "accepted": self.accepted},
        }


def open_source(source: str, profile: ModelProfile, *, revision: str | None, accept_licence: bool) -> Source:
    """The checkpoint of a folder or hub id, once its licence is accepted; it fits the profile.

    Raises
    ------
    LicenceNotAccepted
        The user has to accept the licence of the weights and did not; nothing was downloaded.
    UnsupportedCheckpoint
        As `locate`, `Checkpoint` and `require_fit`.
    """
    licence = licence_of(source, profile)
    if licence.non_commercial and not accept_licence:
        raise LicenceNotAccepted(
            f"the weights of {source} are under {licence.name} ({licence.stated}), for non-commercial research only; "
            "read the licence, then pass --accept-licence"
        )
    folder, commit = located(source, profile, revision)
    checkpoint = Checkpoint(folder)
    require_fit(source, checkpoint, profile)
    return Source(source if commit else folder.resolve().name, commit, checkpoint, licence, accept_licence)


def located(source: str, profile: ModelProfile, revision: str | None = None) -> tuple[Path, str | None]:
    """`locate`, by default at the revision of the profile's checkpoint, however its id is capitalised."""
    return locate(source, profile.revision if revision is None and _is(source, profile) else revision)


def _is(repository: str | None, profile: ModelProfile) -> bool:
    """The hub takes an id in any case."""
    return repository is not None and repository.casefold() == profile.checkpoint_id.casefold()


def licence_of(source: str, profile: ModelProfile) -> Licence:
    """The licence of the weights: that of the bundled profile made for them, else that of the profile in use."""
    return (_made_for(source) or profile).licence


def require_fit(source: str, checkpoint: Checkpoint, profile: ModelProfile) -> None:
    """Refuse a checkpoint that is not one of the profile's.

    Raises
    ------
    UnsupportedCheckpoint
        It is the hub's for another bundled profile, or its sizes or special tokens differ; names all of it.
    """
    made_for, wrong = _made_for(source), []
    if made_for and not _is(made_for.checkpoint_id, profile):
        wrong.append(f"it is {made_for.checkpoint_id}, the profile is of {profile.checkpoint_id}")
    if profile.checkpoint:
        wrong += [
            f"{what} is {here}, of the profile {there}"
            for what, here, there in _compared(checkpoint, profile.checkpoint)
            if here != there
        ]
    if wrong:
        raise UnsupportedCheckpoint(
            f"{source} is no checkpoint of profile {profile.name}: {'; '.join(wrong)}; give the profile made for it, "
            "or one of your own whose `checkpoint` says what it looks like"
        )


def _compared(checkpoint: Checkpoint, shape: CheckpointShape) -> Iterator[tuple[str, int | str, int]]:
    """What a profile states, as (name, of the checkpoint, of the profile)."""
    for part in ("text", "vision"):
        for name, size in vars(getattr(shape, part)).items():
            yield f"{part} {name}", getattr(getattr(checkpoint, part), name), size
    ids = checkpoint.token_ids()
    of_config = {"<|image_pad|>": checkpoint.image_token_id, "<|vision_start|>": checkpoint.vision_start_token_id}
    for token, number in shape.tokens.items():
        yield f"token {token}", ids.get(token, "absent"), number
        yield f"token {token} in config.json", of_config.get(token, number), number


def _made_for(source: str) -> ModelProfile | None:
    """The bundled profile of a hub repository."""
    repository = hub_id(source)
    return next((p for p in map(load_profile, profile_names()) if _is(repository, p)), None)


def hub_id(source: str) -> str | None:
    """Hub repository of a checkpoint: the id itself, or the one whose snapshot in the hub's cache a folder is."""
    if not Path(source).is_dir():
        return source
    names = [part for part in Path(source).resolve().parts if part.startswith("models--")]
    return names[-1].removeprefix("models--").replace("--", "/") if names else None


def locate(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Folder of a checkpoint, downloaded when `source` is a hub id.

    Parameters
    ----------
    source : str
        An existing folder, or `ORG/NAME` on the Hugging Face hub.
    revision : str, optional
        Branch, tag or commit of a hub id.

    Returns
    -------
    folder : Path
    revision : str or None
        The commit that a hub id resolved to, of which all files are; None for a plain folder.

    Raises
    ------
    UnsupportedCheckpoint
        Neither a folder nor a hub id, or the hub does not give it.
    """
    if Path(source).is_dir():
        return Path(source), None
    if not _HUB_ID.fullmatch(source):
        raise UnsupportedCheckpoint(f"{source!r} is neither a folder nor a hub id ORG/NAME; check the spelling")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedCheckpoint(
            f"the hub does not give {source} at revision {revision or 'main'}: {reason}; check id, revision, network "
            "and access (`hf auth login`), or give a local folder"
        ) from None
    commit = folder.name  # a snapshot's folder is named after its commit
    if not _COMMIT.fullmatch(commit) or (revision and _COMMIT.fullmatch(revision) and commit != revision):
        raise UnsupportedCheckpoint(
            f"the hub gives {source} at revision {revision or 'main'} as {commit!r:.60}, not that commit; clear "
            "its cache (`hf cache rm`) or give a local folder"
        )
    return folder, commit
