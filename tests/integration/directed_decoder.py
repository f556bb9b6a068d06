"""Lets a test direct the `decoder` of a packaged repository: what boxes it writes, and when it pauses.

All else is the demonstration model's own: what it is given, what it writes of every other task, and what the other
models of the ensemble make of it.
"""

from pathlib import Path

ADDED = """

import dataclasses
from pathlib import Path

_MODEL = TritonPythonModel


class TritonPythonModel(_MODEL):
    def outputs(self, stream, chunk):
        if json.loads(stream.context).get("answer") == "boxes":
            stream.told = getattr(stream, "told", 0)
            part = BOXES[stream.told :] if chunk.completion else BOXES[stream.told : stream.told + 4]
            stream.told += len(part)
            completion = chunk.completion and dataclasses.replace(
                chunk.completion, text=BOXES, finish_reason="stop", token_logprobs=(), token_ends=(), scores={}
            )
            chunk = dataclasses.replace(chunk, text=part, completion=completion)
        return super().outputs(stream, chunk)

    def send(self, stream, chunk, step):
        super().send(stream, chunk, step)
        stream.written = getattr(stream, "written", 0) + len(chunk.text)
        while stream.written > ENOUGH and Path(HOLD).exists():
            time.sleep(0.01)
"""


def direct(repository: Path, hold: Path, boxes: str, enough: int = 40) -> None:
    """Let it write `boxes` where boxes are asked for, and pause after so many characters while `hold` is there."""
    code = repository / "decoder" / "1" / "model.py"
    code.write_text(f"{code.read_text()}\n\nBOXES, HOLD, ENOUGH = {boxes!r}, {str(hold)!r}, {enough}\n{ADDED}")
