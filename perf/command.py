"""`cxr-triton bench run`, `compare` and `history`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from cxr_triton.cli import EXIT_INTERRUPTED, OUT_FILE, Waiting, json_option, write_json
from cxr_triton.files import write
from cxr_triton.perf.compare import compare_command, history_command
from cxr_triton.perf.peers import PEERS


@click.group()
def bench():
    """Measure a served reader, and compare measurements."""


def _numbers(kind):
    def convert(context, parameter, value: str):
        try:
            return tuple(kind(part) for part in value.split(",") if part.strip())
        except ValueError:
            raise click.BadParameter(f"{value!r} is no list of numbers such as 1,2,4") from None

    return convert


@bench.command()
@click.argument("repository", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--url", help="gRPC endpoint of a server that runs already, in place of REPOSITORY.")
@click.option("--metrics", metavar="HOST:PORT", help="Metrics of the server at --url.")
@click.option(
    "--workload", default="phantom", show_default=True, help="A bundled workload, or the path of a YAML file."
)
@click.option(
    "--images", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of images to use instead."
)
@click.option("--scenario", "scenarios", multiple=True, help="Only this; may be repeated.  [default: all four]")
@click.option("--seconds", default=20.0, show_default=True, help="Least duration of a repeat.")
@click.option("--requests", default=20, show_default=True, help="Fewest requests of a repeat.")
@click.option("--repeats", default=3, show_default=True, help="Of each load; two or more give confidence intervals.")
@click.option("--warm-up", default=4, show_default=True, help="Requests before anything counts.")
@click.option("--offline-concurrency", default=16, show_default=True, help="Requests under way in offline.")
@click.option(
    "--rates",
    default="",
    callback=_numbers(float),
    help="Readings per second of server and interactive, ascending.  [default: 0.5, 0.7 and 0.85 of offline]",
)
@click.option(
    "--sweep", default="1,2,4,8", show_default=True, callback=_numbers(int), help="Concurrencies; '' for none."
)
@click.option("--latency-ms", default=12_000.0, show_default=True, help="Bound of server, 99th percentile.")
@click.option("--ttft-ms", default=500.0, show_default=True, help="Bound of interactive, 99th percentile.")
@click.option("--itl-ms", default=30.0, show_default=True, help="Bound of interactive, 99th percentile.")
@click.option(
    "--perf-analyzer",
    "tool",
    default="find",
    show_default=True,
    metavar="find|none|PATH",
    help="Second driver of the sweep; find looks for it and downloads it if need be.",
)
@click.option(
    "--baseline",
    "baseline",
    multiple=True,
    metavar="NAME=CHECKPOINT",
    help=f"Beside REPOSITORY: {', '.join(PEERS)}, with the checkpoint's folder; may be repeated.",
)
@click.option("--baseline-rounds", default=3, show_default=True, help="Requests that each baseline takes in turn.")
@click.option("--ready-timeout-s", default=600.0, show_default=True, help="For REPOSITORY to be loaded and warm.")
@click.option("--timeout-s", default=600.0, show_default=True, help="Limit of one request.")
@click.option("--seed", default=0, show_default=True, help="Of the arrivals.")
@click.option("--csv", "csv_path", type=OUT_FILE, help="Write the requests and summaries as CSV.")
@click.option("--html", "html_path", type=OUT_FILE, help="Write the report page.")
@json_option
def run(
    repository,
    url,
    metrics,
    workload,
    images,
    scenarios,
    tool,
    baseline,
    timeout_s,
    csv_path,
    html_path,
    json_path,
    **numbers,
):
    """Measure REPOSITORY, which is served for it on free ports of this machine, or the server at --url.

    Four scenarios in MLPerf's words, then a sweep over concurrency by our client and by perf_analyzer in turn. Ends
    with an error at the first request that fails for another reason than overload. Ctrl-C keeps the repeats that were
    measured, and ends with status 130.
    """
    from tqdm import tqdm

    from cxr_triton.client.wire import require_endpoint
    from cxr_triton.engines.bundle import Bundle
    from cxr_triton.errors import InvalidRequest, unknown_key
    from cxr_triton.perf import peers, perf_analyzer, roofline
    from cxr_triton.perf.bench import SCENARIOS, Bench, Observer, Plan, served_models, table
    from cxr_triton.perf.report import extras, result_page, to_csv
    from cxr_triton.perf.workload import load_workload
    from cxr_triton.triton_repo.package import BUNDLE
    from cxr_triton.triton_repo.serve import Server

    if (repository is None) == (url is None):
        raise click.UsageError("give REPOSITORY or --url, one of them")
    if url:
        require_endpoint(url)
    beside = peers.parse(baseline)
    if beside and not repository:
        raise click.UsageError("--baseline runs on the server's own cores: give REPOSITORY, not --url")
    for name in scenarios:
        if name not in SCENARIOS:
            raise InvalidRequest(unknown_key(name, SCENARIOS, "--scenario"))
    plan = Plan(
        scenarios=scenarios or SCENARIOS,
        min_seconds=numbers["seconds"],
        min_requests=numbers["requests"],
        repeats=numbers["repeats"],
        warm_up=numbers["warm_up"],
        offline_concurrency=numbers["offline_concurrency"],
        rates_per_s=numbers["rates"],
        concurrencies=numbers["sweep"],
        latency_ms=numbers["latency_ms"],
        ttft_ms=numbers["ttft_ms"],
        itl_ms=numbers["itl_ms"],
        seed=numbers["seed"],
    )
    analyzer = None
    if tool != "none" and plan.concurrencies:
        analyzer = perf_analyzer.find() if tool == "find" else perf_analyzer.PerfAnalyzer.at(Path(tool).resolve())
    drawn = load_workload(workload, images=images)
    with contextlib.ExitStack() as stack:
        if repository:
            ports = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
            with Waiting("starting the server"):
                server = stack.enter_context(Server(repository, **ports, ready_timeout_s=numbers["ready_timeout_s"]))
            url, observer = server.grpc, Observer(server.grpc, server.metrics, lambda: server.pids)
        else:
            observer = Observer(url, metrics)
        more = bool(beside) * (1 + numbers["baseline_rounds"]) + len(beside)
        bar = stack.enter_context(tqdm(total=1 + plan.runs + more, unit="run", disable=None))

        def on_run(what: str) -> None:
            bar.set_description(what)
            bar.update()

        measured = Bench(url, drawn, plan, observer, analyzer, timeout_s=timeout_s, on_run=on_run)
        result = measured.run(["cxr-triton", *sys.argv[1:]])
        if repository:
            result["server"]["models"] = served_models(repository)
        if repository and not result.get("interrupted"):
            bundle, rounds = Bundle.open(repository / BUNDLE, verify=False), numbers["baseline_rounds"]
            try:
                result["roofline"] = roofline.measure(result, bundle)
                if beside:
                    items = [([image.data for image in item.images], item.request) for item in drawn.items]
                    result["baselines"] = peers.measure(
                        url, items, bundle.profile, beside, rounds=rounds, on_round=on_run
                    )
            except KeyboardInterrupt:
                result["interrupted"] = True
    click.echo("\n".join([table(result), *extras(result)]), err=json_path == "-")
    click.secho(result["notice"], fg="yellow", err=True)
    write_json(result, json_path)
    for path, text in ((csv_path, to_csv), (html_path, result_page)):
        if path:
            write(path, text(result))
    if result.get("interrupted"):
        click.echo("interrupted: the result has what was measured until then", err=True)
        sys.exit(EXIT_INTERRUPTED)


bench.add_command(compare_command)
bench.add_command(history_command)
