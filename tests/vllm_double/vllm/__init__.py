from types import SimpleNamespace


class EngineArgs(SimpleNamespace):
    pass


class SamplingParams(SimpleNamespace):
    pass
