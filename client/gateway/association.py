"""What every association has, in and out: limits under pynetdicom, where bytes come off the socket, and its calls.

pynetdicom trusts a peer: it buffers a PDU of any announced length and waits without limit for the rest of one.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pynetdicom
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.fsm import InvalidEventError

from cxr_triton.client.gateway.config import Remote, Unreachable
from cxr_triton.errors import LimitExceeded

MAX_IN_MEMORY = 1 << 20


def prepare_pynetdicom(new_file: Callable[[], object]) -> None:
    """Have objects written to files of `new_file` as they come, and nothing of them into logs."""
    messages: Any = pynetdicom.dimse_messages
    # There is no setting for the folder of its temporary files, and a rename needs the same file system.
    messages.NamedTemporaryFile = lambda **_: new_file()
    pynetdicom._config.STORE_RECV_CHUNKED_DATASET = True
    pynetdicom._config.LOG_HANDLER_LEVEL = "none"
    pynetdicom._config.LOG_REQUEST_IDENTIFIERS = pynetdicom._config.LOG_RESPONSE_IDENTIFIERS = False
    for name in ("pynetdicom", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


MOST_ANSWERED = 1 << 22
"""Bytes of an archive's answers on one association or to one query, some ten thousand studies."""
MOST_REPORTED = 1 << 18
"""Bytes of a peer's report on storage commitment, some thousand results."""


MOST_COMMAND = 1 << 16
"""Bytes of a DIMSE command set; those of PS3.7 have hundreds."""


_ABORT = b"\7\0\0\0\0\4\0\0\2\6"
"""A-ABORT of the provider for an invalid PDU parameter value (PS3.8 9.3.8)."""
_THEIR_ABORT = "Evt16"


class Receiver:
    """Takes the place of `AssociationSocket.recv`: the same bytes, or an end of the association beyond the limits.

    It ends by `OSError`. A PDU may have `pdu_limit` bytes and take `pdu_s`, a whole message `max_message` bytes.
    """

    def __init__(self, wire: Any, *, pdu_limit: int, pdu_s: float, max_message: int):
        self._wire, self._pdu_limit, self._pdu_s, self._max_message = wire, pdu_limit, pdu_s, max_message
        self._in_body = False
        self._received = 0
        self._ends = 0.0

    def message_ends(self) -> None:
        """What comes next is of another message."""
        self._received = 0

    def __call__(self, size: int) -> bytearray:
        """Up to `size` bytes, fewer at the end of the connection."""
        connection = self._wire.socket
        if not self._in_body:
            self._ends = time.monotonic() + self._pdu_s
        self._received += size
        try:
            if size > self._pdu_limit or self._received > self._max_message:
                raise OSError(f"{size} bytes of a PDU, {self._received} of a message")
            data = bytearray(size)
            view, got = memoryview(data), 0
            while got < size:
                connection.settimeout(max(self._ends - time.monotonic(), 0.001))
                read = connection.recv_into(view[got:])
                if not read:
                    break
                got += read
            connection.settimeout(self._pdu_s)
        except OSError:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            raise
        self._in_body = not self._in_body and got == size and 1 <= data[0] <= 7
        return data if got == size else data[:got]


def _wire(association: Association) -> Any:
    """Pynetdicom's end of the connection; its `recv` is a `Receiver` from `limit` on."""
    return association.dul.socket


def whole_request(event: evt.Event) -> Any:
    """The request of a message that came whole; what comes next counts anew. An object's file is `_dataset_file`."""
    _wire(event.assoc).recv.message_ends()
    return event.request


def _require_short_command(message: Any, data: Any) -> None:
    """Raise `ValueError` for a command set that is longer than one can be; pydicom would parse it in this process."""
    parts = getattr(data, "presentation_data_value_list", None) or []
    received = sum(len(part) for _, part in parts if part[:1] and part[0] & 1)
    if message is not None:
        received += message.encoded_command_set.getbuffer().nbytes
    if received > MOST_COMMAND:
        raise ValueError(f"{received} bytes of a command set")


def limit(
    association: Association,
    *,
    pdu_limit: int,
    pdu_s: float,
    max_message: int,
    on_junk: Callable[[Exception], None] = lambda _: None,
) -> None:
    """Put a `Receiver` under an association, and end it by an A-ABORT where what comes is no message.

    Only the data set of a C-STORE goes to the disk as it comes; everything else is kept in memory and may have 1 MiB.
    """
    wire = _wire(association)
    wire.recv = Receiver(wire, pdu_limit=pdu_limit, pdu_s=pdu_s, max_message=max_message)
    dimse: Any = association.dimse
    take = dimse.receive_primitive

    def take_or_abort(data: object) -> None:
        """Without this, data that are no message would end pynetdicom's thread instead of the association."""
        try:
            _require_short_command(dimse.message, data)
            take(data)
            message = dimse.message
            if message and max(message.encoded_command_set.tell(), message.data_set.tell()) > MAX_IN_MEMORY:
                raise LimitExceeded(f"a message that is no object has over {MAX_IN_MEMORY} bytes")
        except Exception as error:
            on_junk(error)
            association.dul.event_queue.put("Evt19")  # as an invalid PDU: A-ABORT

    dimse.receive_primitive = take_or_abort
    _end_on_errors(association, on_junk)


def _end_on_errors(association: Association, on_junk: Callable[[Exception], None]) -> None:
    """What a peer says wrong in a request or an abort would end pynetdicom's threads without an answer."""
    acse: Any = association.acse
    machine: Any = association.dul.state_machine
    negotiate, act = acse.negotiate_association, machine.do_action

    def negotiate_or_abort() -> None:
        try:
            negotiate()
        except Exception as error:
            on_junk(error)
            association.abort()

    def act_or_end(event: str) -> None:
        try:
            act(event)
        except InvalidEventError:
            pass  # an answer to a peer that broke off meanwhile
        except Exception as error:
            on_junk(error)
            if event != _THEIR_ABORT:
                with contextlib.suppress(OSError, AttributeError):  # it may be closed
                    _wire(association).send(_ABORT)
            # pynetdicom ends the association where it cannot act

    acse.negotiate_association, machine.do_action = negotiate_or_abort, act_or_end


def forget_messages(association: Association) -> None:
    """Let go of what an association that has ended did not hand on: objects that broke off, or that nobody took."""
    association.dimse.message = None
    association.dimse.msg_queue = queue.Queue()


@contextlib.contextmanager
def associate(
    to: Remote,
    aet: str,
    contexts: Mapping[str, Sequence[str]],
    handlers: Sequence = (),
    roles: Sequence = (),
    *,
    max_bytes: int = MOST_ANSWERED,
) -> Iterator[Association]:
    """An association with a PACS, for SOP classes with their transfer syntaxes; released at the end.

    Parameters
    ----------
    to : Destination or Priors
    aet : str
        Of this gateway.
    contexts : mapping of str to sequence of str
    handlers, roles
        As pynetdicom takes them.
    max_bytes : int
        Of all answers together, which pydicom parses in this process, or of one object that is fetched.

    Raises
    ------
    Unreachable
        No connection, no answer in time, or a refusal.
    """
    ae = AE(aet)
    ae.maximum_pdu_size = 131_072
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = to.timeout_s
    for sop_class, syntaxes in contexts.items():
        ae.add_requested_context(sop_class, list(syntaxes))

    def bound(event: evt.Event) -> None:
        limit(event.assoc, pdu_limit=1 << 20, pdu_s=to.timeout_s, max_message=max_bytes)
        _wire(event.assoc).socket.settimeout(to.timeout_s)

    called, host = to.pacs
    association = ae.associate(
        host,
        to.port,
        ae_title=called,
        tls_args=(to.tls.client(), host) if to.tls else None,
        evt_handlers=[(evt.EVT_CONN_OPEN, bound), *handlers],
        ext_neg=list(roles),
    )
    if not association.is_established:
        why = "rejected the association" if association.is_rejected else "is not reachable"
        raise Unreachable(f"{called} at {host} port {to.port} {why}")
    try:
        yield association
    finally:
        if association.is_established:
            association.release()
