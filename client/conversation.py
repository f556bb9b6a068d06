"""A dialogue about one patient's pictures: `Reader.open` and `AsyncReader.open` give a `Conversation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

from cxr_triton.client import wire
from cxr_triton.client.base import BaseReader, Stream
from cxr_triton.errors import InvalidRequest
from cxr_triton.identity import require_same_images, sha256
from cxr_triton.reading import Reading
from cxr_triton.request import MAX_TURNS


class Conversation(Generic[Stream]):
    """Questions about the same pictures, each with what was asked and answered before.

    A turn counts once its reading is complete. One that fails or is closed leaves the conversation as it was, so it can
    be asked again. Pictures are sent with every turn; the server recognizes them.

    Parameters
    ----------
    reader : Reader or AsyncReader
    images : bytes, path, or a sequence of these
        As `Reader.read` takes them. Paths are read here, once.
    follow : sequence of Reading
        Earlier turns, the oldest first.
    unchecked_reading : bool
        Take readings that do not say which images they are of, as older servers wrote them.
    **options
        Of every turn, as `Reader.read` takes them; `ask` may give others.

    Raises
    ------
    OSError
        A path cannot be read.
    ReadingMismatch
        A reading of `follow` is of other images.

    Examples
    --------
    >>> with Reader() as reader:
    ...     conversation = reader.open("chest.dcm")
    ...     conversation.ask(task="findings").result()
    ...     for delta in conversation.ask("Provide differentials."):
    ...         print(delta, end="", flush=True)
    """

    def __init__(
        self,
        reader: BaseReader[Stream],
        images: wire.Image | Sequence[wire.Image] = (),
        *,
        follow: Sequence[Reading] = (),
        unchecked_reading: bool = False,
        **options: Any,
    ):
        self._reader, self._options = reader, options
        self._images = wire.image_bytes(images)
        self._turns = list(follow)
        self._asked: Stream | None = None
        given = [{"file_sha256": sha256(image)} for image in self._images] if follow else []
        names = [f"image {number}" for number in range(1, len(given) + 1)]
        for number, reading in enumerate(self._turns, 1):
            require_same_images(
                reading.images, given, names=names, reading=f"turn {number}", unchecked_reading=unchecked_reading
            )

    @property
    def turns(self) -> tuple[Reading, ...]:
        """Readings of the turns that are complete, the oldest first."""
        self._take()
        return tuple(self._turns)

    @property
    def history(self) -> list[dict[str, str]]:
        """The turns as REQUEST has them."""
        return [turn for reading in self.turns for turn in turns_of(reading)]

    def ask(self, prompt: str | None = None, *, task: str | None = None, **options: Any) -> Stream:
        """The next turn; options as `Reader.read` takes them.

        Parameters
        ----------
        prompt, task : str, optional
            What is asked: free text, or a task of the served profile; its default task without either.

        Returns
        -------
        ReadingStream or AsyncReadingStream

        Raises
        ------
        InvalidRequest
            The answer before is still under way, or the conversation has as many turns as a request may hold.
        LimitExceeded
            The images are larger than the reader sends.
        """
        self._take()
        if self._asked is not None and not self._asked.is_over:
            raise InvalidRequest("the answer before is still under way; read it to its end, or close its stream")
        history = self.history
        if len(history) > MAX_TURNS:
            raise InvalidRequest(
                f"the conversation has {len(history) // 2} turns, as many as a request may hold; open a new one"
            )
        self._asked = self._reader.read(
            self._images, prompt=prompt, task=task, history=history or None, **{**self._options, **options}
        )
        return self._asked

    def _take(self) -> None:
        """Count the turn that was asked last, if it is complete."""
        if self._asked is not None and self._asked.reading is not None:
            self._turns.append(self._asked.reading)
            self._asked = None


def turns_of(reading: Reading) -> list[dict[str, str]]:
    """What was asked and answered in a reading, as turns of a REQUEST's history."""
    return [{"role": "user", "content": reading.prompt}, {"role": "assistant", "content": reading.text}]
