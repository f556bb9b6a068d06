"""A room of paper for the house's test: an engine that runs a checkpoint itself, by a scheduler of its own, anywhere.

Its bundle holds a checkpoint of any number of files in the place of a decoder graph, beside a tower of another engine.
"""

import shutil
from types import SimpleNamespace

from cxr_triton.engines.interface import Compiled, Engine, Serving
from cxr_triton.errors import InvalidBundle, InvalidRecipe


class Paper(Engine):
    name = "paper"
    extra = "local"
    graphs = ("decoder",)
    form = "checkpoint"
    folder = "paper"
    computes = ("bf16",)

    def files(self, graph):
        return ("paper/config.json",)

    def exchanges(self, vision_precision, compute):
        return True

    def check_decoder(self, recipe):
        if recipe.decoder.precision != "bf16":
            raise InvalidRecipe(f"decoder.precision: {recipe.decoder.precision} on paper; choose bf16")

    def check_target(self, recipe, graph):
        if recipe.gpu:
            super().check_target(recipe, graph)

    def stream_bytes(self, recipe, text):
        return text.hidden_size

    def prepare(self, job):
        if not list((job.source / "decoder").glob("*.safetensors")):
            raise InvalidBundle(f"{job.source / 'decoder'} holds no weights; export again")
        return super().prepare(job)

    def compile(self, job, folder):
        shutil.copytree(job.source / "decoder", folder / self.folder)
        return Compiled({"paper": "1.0"})

    def open_runtime(self, bundle, parameters, address):
        shards = sorted(path.name for path in (bundle.path / self.folder).glob("*.safetensors"))
        return SimpleNamespace(shards=shards, parameters=dict(parameters), address=address)

    def serving(self, bundle, settings):
        return Serving(parameters={"slots": settings.slots or 9, "sheets": 2})

    def run_bytes(self, bundle, graph):
        return sum(path.stat().st_size for path in (bundle.path / self.folder).glob("*.safetensors"))


ENGINE = Paper()
