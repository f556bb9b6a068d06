"""When a served model is started again because its server has grown."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from cxr_triton.errors import InvalidRequest
from cxr_triton.triton_repo import drain, renew


@pytest.fixture
def grown(monkeypatch):
    """A server of 100 MiB; `grown.mib` is what its process holds, `grown.busy` what its metrics say."""
    state = SimpleNamespace(mib=100.0, busy=0.0, log=[])
    monkeypatch.setattr(renew, "resident_mib", lambda pid: state.mib)
    monkeypatch.setattr(renew, "under_way", lambda metrics: state.busy)
    return state


@pytest.mark.parametrize(
    ("mib", "busy", "due"),
    [(150, 0, False), (299, 0, False), (300, 0, True), (300, 1, False), (499, 1, False), (500, 1, True)],
)
def test_it_is_renewed_in_a_quiet_moment_and_at_twice_the_limit_in_any_case(grown, mib, busy, due):
    renewal = renew.Renewal(SimpleNamespace(pid=1, metrics="nowhere:1"), 200)
    grown.mib, grown.busy = mib, busy
    assert renewal.is_due() is due


def test_zero_never_renews_and_less_is_refused(grown):
    server = SimpleNamespace(pid=1, metrics="nowhere:1")
    renewal = renew.Renewal(server, 0)
    grown.mib = 1e6
    assert not renewal.is_due()
    with pytest.raises(InvalidRequest, match="--renew-mib"):
        renew.Renewal(server, -1)


def test_what_is_under_way_is_read_from_the_metrics():
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(
                b"# TYPE nv_inference_pending_request_count gauge\n"
                b'nv_inference_pending_request_count{model="decoder",version="1"} 2\n'
                b'nv_inference_count{model="decoder",version="1"} 70\n'
                b"cxr_decoder_streams 3\ncxr_decoder_steps_total 99\n"
            )

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    assert drain.under_way(f"127.0.0.1:{server.server_port}") == 5
    server.shutdown()
    server.server_close()
    assert drain.under_way(f"127.0.0.1:{server.server_port}") == 1
