"""A whole `bench run`: the server that is measured, the measurement, then ceilings and what one would use instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cxr_triton.cli import Waiting
from cxr_triton.client.limits import Access
from cxr_triton.engines.bundle import Bundle
from cxr_triton.perf import peers, roofline
from cxr_triton.perf.bench import Bench, Observer, Plan, ending, served_models
from cxr_triton.perf.perf_analyzer import PerfAnalyzer
from cxr_triton.perf.workload import Workload
from cxr_triton.triton_repo.package import BUNDLE
from cxr_triton.triton_repo.serve import Server


@contextmanager
def serving(repository: Path, ready_timeout_s: float) -> Iterator[Observer]:
    """A model repository on free ports of this machine until the block ends."""
    server = Server(repository, grpc_port=0, metrics_port=0, ready_timeout_s=ready_timeout_s)
    with Waiting("starting the server") as waiting, server as up:
        waiting.end()
        yield Observer(up.grpc, up.metrics, lambda: up.pids, up.secret)


def measure(
    observer: Observer,
    workload: Workload,
    plan: Plan,
    *,
    repository: Path | None = None,
    tool: PerfAnalyzer | None = None,
    door: tuple[str, Access] | None = None,
    beside: Mapping[str, Path] | None = None,
    rounds: int = 3,
    timeout_s: float = 600.0,
    command: Sequence[str] = (),
) -> tuple[dict, BaseException | None]:
    """Measure a warm server.

    Parameters
    ----------
    observer : Observer
    workload : Workload
    plan : Plan
    repository : Path, optional
        What is served on this machine: its bundle's ceilings are measured too.
    tool : PerfAnalyzer, optional
        Second driver of the sweep.
    door : str and Access, optional
        Of the front door that the load goes through.
    beside : mapping, optional
        Baseline to its checkpoint, see `peers.measure`.
    rounds : int
        Requests that each baseline takes in turn.
    timeout_s : float
        Limit of one request.
    command : sequence of str
        What the result says that it was made by.

    Returns
    -------
    dict
        The result as docs/bench.schema.json describes it.
    BaseException or None
        What ended it before its time; what was measured until then is in the result.
    """
    from tqdm import tqdm

    beside = beside or {}
    more = bool(beside) * (1 + rounds) + len(beside)
    with tqdm(total=1 + plan.runs + more, unit="run", disable=None) as bar:

        def on_run(what: str) -> None:
            bar.set_description(what)
            bar.update()

        bench = Bench(workload, plan, observer, tool, door=door, timeout_s=timeout_s, on_run=on_run)
        result = bench.run(command)
        if repository:
            with bench.keeping(result):
                result["server"]["models"] = served_models(repository)
                bundle = Bundle.open(repository / BUNDLE, verify=False)
                if not bench.ended_by:
                    result["roofline"] = roofline.measure(result, bundle)
                if beside and not bench.ended_by:
                    items = [([image.data for image in item.images], item.request) for item in workload.items]
                    result["baselines"] = peers.measure(
                        observer.url, items, bundle.profile, beside, rounds=rounds, on_round=on_run
                    )
    return result | ending(bench.ended_by), bench.ended_by
