"""`doctor` looks at a real server, guarded and by hand, and at a real PostgreSQL."""

import pytest
from gateway_peers import Postgres, wait_for
from test_strangers import by_hand

from cxr_triton.client.gateway.database import look
from cxr_triton.client.gateway.store import Store
from cxr_triton.doctor.check import Case
from cxr_triton.doctor.run import CHECKS, examine
from cxr_triton.engines.secret import SECRET
from cxr_triton.triton_repo.guard import is_ready

SERVER = [check for check in CHECKS if check.id.startswith("server.")]
OF_THE_MACHINE = {"server.user", "server.memory"}
"""Where the tests run as root, and without a limit on memory."""


def wrong(case: Case) -> set[str]:
    return {f.id for f in examine(case, SERVER) if f.status in ("warn", "fail")} - OF_THE_MACHINE


@pytest.mark.triton
def test_a_server_that_serve_started_is_sound(server):
    assert wrong(Case(url=server.grpc, is_asked=True)) == set()
    found = {finding.id: finding for finding in examine(Case(url=server.grpc, is_asked=True), SERVER)}
    assert found["server.version"].found.startswith("2.51") and found["server.flags"].status == "ok"
    for door in ("shared_memory", "repository", "trace", "logging", "statistics"):
        assert found[f"server.{door}"].status == "ok", door
    assert found["server.http"].found == "health and metadata only"


@pytest.mark.triton
def test_a_server_that_was_started_without_the_guard_is_not(served_bundle, tmp_path):
    from cxr_triton.triton_repo.package import Settings, write_repository

    settings = Settings(threads=1, slots=1, preprocess_instances=1)
    write_repository(served_bundle, tmp_path / "repository", settings, unverified=True)
    secret = {SECRET: "of the operator's own choice, and long"}
    with by_hand(tmp_path / "repository", environment=secret) as (process, address, log):
        wait_for(lambda: process.poll() is not None or is_ready(address), "the server's start", 120)
        assert process.poll() is None, log.read_text()[-2000:]
        doors = ("shared_memory", "repository", "trace", "logging", "statistics")
        assert wrong(Case(url=address, is_asked=True)) == {f"server.{door}" for door in doors}
        assert process.poll() is None and is_ready(address), "to look harms nothing"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    pytest.importorskip("psycopg")
    with Postgres(tmp_path_factory.mktemp("postgres")) as database:
        yield database


def test_a_look_at_postgresql_reads_only_and_tells_what_is_missing(postgres):
    import psycopg

    seen = look(postgres.url)
    assert seen.is_new and seen.missing and abs(seen.ahead_s) < 5
    assert look(postgres.url).is_new, "to look makes no table"
    Store(postgres.url, "one").close()
    assert (look(postgres.url).missing, look(postgres.url).dead) == ((), 0)
    with psycopg.connect(postgres.url.replace("+psycopg", "")) as connection:
        connection.execute("ALTER TABLE jobs DROP COLUMN generation")
        connection.execute("DROP TABLE switches")
    assert look(postgres.url).missing == ("jobs.generation", "switches")
