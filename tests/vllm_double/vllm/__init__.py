from types import SimpleNamespace


class EngineArgs(SimpleNamespace):
    def __init__(self, **arguments):
        super().__init__(structured_outputs_config=SimpleNamespace(backend="auto"), **arguments)


class SamplingParams(SimpleNamespace):
    pass
