"""C-STORE and C-ECHO as a way in.

pynetdicom counts silent connections as associations and logs what it hears. `Listener` puts limits under it.
"""

from __future__ import annotations

import collections
import ipaddress
import re
import socket
import threading
import time
from typing import Any

from pydicom import Dataset
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from cxr_triton.client.address import LOOPBACK
from cxr_triton.client.gateway.association import forget_messages, limit, whole_request
from cxr_triton.client.gateway.commitment import OnCommitment, take_commitment
from cxr_triton.client.gateway.dimse import PUSH_MODEL, SUCCESS, VERIFICATION
from cxr_triton.client.gateway.doors import Dicom
from cxr_triton.client.gateway.intake import MIB, REFUSALS, Intake, Mismatch, status_of
from cxr_triton.errors import CxrError, Unavailable
from cxr_triton.pixels.dicom import Identity


class Listener:
    """C-STORE and C-ECHO SCP; also takes the answers to storage commitment.

    Parameters
    ----------
    config : Dicom
    intake : Intake
    on_commitment : callable
        Takes what `take_commitment` makes of an answer.

    Attributes
    ----------
    port : int
        What is listened on.

    Raises
    ------
    Unavailable
        The port is taken.
    """

    def __init__(self, config: Dicom, intake: Intake, on_commitment: OnCommitment):
        self.config, self.intake, self._on_commitment = config, intake, on_commitment
        ae = self._ae = AE(config.aet)
        ae.maximum_pdu_size = config.max_pdu_bytes
        ae.maximum_associations = 1 << 16  # counted here, see `_Server`
        ae.require_called_aet = True
        ae.acse_timeout = config.first_pdu_s
        ae.dimse_timeout = config.pdu_s
        ae.network_timeout = config.idle_s
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)
        ae.add_supported_context(VERIFICATION)
        ae.add_supported_context(PUSH_MODEL, scu_role=False, scp_role=True)
        handlers: list[evt.EventHandlerType] = [
            (evt.EVT_CONN_CLOSE, self._on_close),
            (evt.EVT_REQUESTED, self._on_request),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_N_EVENT_REPORT, self._on_event_report),
        ]
        try:
            self._server = ae.make_server(
                (config.host, config.port),
                evt_handlers=handlers,
                server_class=_Server,
                request_handler=_Handler,
                listener=self,
            )
        except OSError as error:
            raise Unavailable(
                f"dicom: cannot listen on {config.host} port {config.port} ({error.strerror}); stop what listens there"
            ) from None
        ae._servers.append(self._server)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="dicom", daemon=True)
        self._thread.start()

    def stop(self, grace_s: float = 5.0) -> None:
        """Take no more, let associations that are in the middle of an object end, then close them."""
        self.intake.draining = True
        self._server.shutdown()
        ends = time.monotonic() + grace_s
        while self._server.active_associations and time.monotonic() < ends:
            time.sleep(0.05)
        for association in self._server.active_associations:
            association.abort()

    @property
    def networks(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """Where connections may come from."""
        return [n for peer in self.config.peers for n in peer.networks] or list(LOOPBACK)

    def _may(self, aet: str, address: str) -> bool:
        if not self.config.peers:
            return True  # the server has let the loopback interface through and nothing else
        return any(peer.aet == aet and _is_in(address, peer.networks) for peer in self.config.peers)

    def _on_request(self, event: evt.Event) -> None:
        association = event.assoc
        request: Any = association.requestor.primitive
        aet = str(request.calling_ae_title).strip()
        address = association.requestor.address
        others = sum(a.is_established for a in self._server.active_associations)
        answer, why = "accepted", None
        if not self._may(aet, address):
            answer, why = "unknown_peer", (0x01, 0x01, 0x03)
        elif self.intake.draining:
            answer, why = "draining", (0x02, 0x03, 0x01)
        elif others >= self.config.max_associations:
            answer, why = "too_many", (0x02, 0x03, 0x02)
        self.intake.metrics.associations.labels(answer).inc()
        if why:
            self.intake.log("warning", "association_refused", why=answer, aet=aet, address=address)
            association.acse.send_reject(*why)
            association.is_rejected = True
            association.kill()

    def _on_close(self, event: evt.Event) -> None:
        """End a connection that never became an association, which pynetdicom would go on waiting for."""
        dul: Any = event.assoc.dul
        if dul.state_machine.current_state in ("Sta2", "Sta13"):  # no request yet; after an abort of ours
            dul.to_user_queue.put(None)

    def _on_echo(self, event: evt.Event) -> int:
        whole_request(event)
        return SUCCESS

    def _on_store(self, event: evt.Event) -> Dataset:
        request, association = whole_request(event), event.assoc
        source = f"{str(association.requestor.ae_title).strip()}@{association.requestor.address}"

        def expect(identity: Identity) -> None:
            announced = (str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID))
            if announced != (identity.sop_class, identity.sop_instance):
                raise Mismatch("the data set is of another SOP class or instance than the request")

        answer = Dataset()
        answer.Status = SUCCESS
        try:
            self.intake.take(request._dataset_file, "dicom", source, expect)
        except REFUSALS as error:
            answer.Status = status_of(error)
            if isinstance(error, CxrError):
                answer.ErrorComment = _comment(error.message)
        return answer

    def _on_event_report(self, event: evt.Event) -> tuple[int, None]:
        whole_request(event)
        return take_commitment(event, self._on_commitment), None


def _comment(text: str) -> str:
    """A text as an LO of PS3.5 takes it: 64 printable characters without backslash."""
    return re.sub(r"[^ -\[\]-~]", "?", text)[:64]


def _is_in(address: str, networks) -> bool:
    try:
        ip = ipaddress.ip_address(address.split("%", maxsplit=1)[0])
    except ValueError:
        return False
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return any(ip in network for network in networks)


class _Server(ThreadedAssociationServer):
    """Refuses connections before they cost a thread, does TLS in the connection's own thread, and counts."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args, listener: Listener, **kwargs):
        self.listener = listener
        self._open: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._tls = listener.config.tls.server() if listener.config.tls else None
        super().__init__(*args, **kwargs)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a connection may go on."""
        config, address, reason = self.listener.config, client_address[0], None
        with self._lock:
            if not _is_in(address, self.listener.networks):
                reason = "unknown_address"
            elif self._open[address] >= config.max_per_address:
                reason = "too_many_of_address"
            elif self._open.total() >= 4 * config.max_associations:
                reason = "too_many"
            else:
                self._open[address] += 1
                return True
        self.listener.intake.metrics.connections_refused.labels(reason).inc()
        self.listener.intake.log("warning", "connection_refused", why=reason, address=address)
        return False

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Runs in a thread of the connection, to its end."""
        config = self.listener.config
        try:
            request.settimeout(config.first_pdu_s)
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                request = self._tls.wrap_socket(request, server_side=True)
            association = _Handler(request, client_address, self).association
            association.join()
            association.dul.join(config.pdu_s)
            forget_messages(association)
        except OSError as error:
            self.listener.intake.log("warning", "connection_failed", address=client_address[0], error=str(error)[:80])
        finally:
            with self._lock:
                self._open[client_address[0]] -= 1
                self._open += collections.Counter()  # forget addresses without connections
            self.shutdown_request(request)


class _Handler(RequestHandler):
    server: _Server

    def handle(self) -> None:
        self.association = self._create_association()
        config, intake = self.server.listener.config, self.server.listener.intake

        def say(error: Exception) -> None:
            # its text may quote the data
            intake.log("warning", "not_a_message", address=self.client_address[0], error=type(error).__name__)

        most = intake.max_bytes + MIB
        limit(self.association, pdu_limit=config.pdu_limit, pdu_s=config.pdu_s, max_message=most, on_junk=say)
        self.association.start()
