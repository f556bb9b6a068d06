"""What the decoder's own thread takes for a token beside the graph: `python -m cxr_triton.perf.capacity.host BUNDLE`.

The runtime with its scheduler, sampler and the bundle's tokenizer is the real one. The session is of paper: it answers
at once with the best part of a row of logits, as one on a card does, so that all the processor time is the host's.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from cxr_triton.chat import ChatTokenizer
from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.engines.runtime.sampler import TopLogits
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.session import DecoderSession
from cxr_triton.perf.decoder import Receiver
from cxr_triton.perf.environment import cpu_name
from cxr_triton.sampling import Sampling

SCHEMA = 1
VOCAB, BLOCKS, BLOCK = 151_936, 8, 640
"""Of Qwen2.5-VL, and what a session on a card gives of a row."""
PROMPT = 350


class PaperSession(DecoderSession):
    """A session whose rows are drawn beforehand."""

    def __init__(self, slots: int):
        self.slots, self.max_sequence, self.vocab, self.hidden = slots, 1 << 16, VOCAB, 4
        self.lengths = np.zeros(slots, np.int64)
        rng = np.random.default_rng(0)
        self._rows = [self._row(rng) for _ in range(slots)]

    @staticmethod
    def _row(rng: np.random.Generator) -> TopLogits:
        logits = rng.standard_normal((BLOCKS, BLOCK), np.float32)
        logits[0, :8] += 20  # the penalty of one that was seen leaves others above the bound
        return TopLogits(np.arange(BLOCKS), logits, 0.0, lambda: np.zeros(VOCAB, np.float32))

    def prefill(self, slot, input_ids, image_index, image_embeddings, position_ids, *, is_last):
        """The first row of logits."""
        self.lengths[slot] += len(input_ids)
        return self._rows[slot] if is_last else None

    def step(self, input_ids, positions):
        """A row for each stream."""
        self.lengths[: len(input_ids)] += 1
        return self._rows[: len(input_ids)]

    def move(self, source, target):
        """Nothing lies in a slot."""

    def free(self, slot):
        """Nothing lies in a slot."""


def token_ms(tokenizer: ChatTokenizer, streams: int, tokens: int) -> float:
    """Processor time of this process for a token, of so many streams at once."""
    prompt = np.arange(PROMPT)
    generation = Generation(
        input_ids=prompt,
        position_ids=np.tile(prompt, (3, 1)),
        image_index=np.full(PROMPT, -1),
        image_embeddings=np.empty((0, 4), np.float32),
        sampling=Sampling(max_new_tokens=tokens, temperature=0.0, repetition_penalty=1.05),
    )
    with DecoderRuntime(None, session=PaperSession(streams), tokenizer=tokenizer, slots=streams) as runtime:
        receivers = [Receiver() for _ in range(streams)]
        began_s = time.process_time()
        for receiver in receivers:
            runtime.submit(generation, receiver)
        for receiver in receivers:
            receiver.done.wait()
            if receiver.error:
                raise receiver.error
        return 1e3 * (time.process_time() - began_s) / (streams * tokens)


@click.command(cls=Command, extra="local")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", default=300, show_default=True, type=click.IntRange(2, 4096), help="Of each answer.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@json_option
def main(bundle, tokens, rounds, json_path):
    """Processor time of a token in the decoder's thread, with the tokenizer of BUNDLE."""
    tokenizer, streams = ChatTokenizer(bundle), (1, 8, 64)
    token_ms(tokenizer, 1, tokens)
    taken = [{str(n): round(token_ms(tokenizer, n, tokens), 5) for n in streams} for _ in range(rounds)]
    medians = {name: statistics.median(each[name] for each in taken) for name in taken[0]}
    result = {
        "schema": SCHEMA,
        "command": ["python", "-m", "cxr_triton.perf.capacity.host", *sys.argv[1:]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "load_average": os.getloadavg()[0],
        "cpu_ms_per_token": medians,
        "rounds": taken,
    }
    for name, ms in medians.items():
        click.echo(f"{name} streams: {1e3 * ms:.0f} µs of processor time a token")
    write_json(result, json_path)


if __name__ == "__main__":
    main()
