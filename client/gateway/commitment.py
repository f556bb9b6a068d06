"""Storage commitment (PS3.4 J): asking a destination whether it keeps results, and its answer on any association."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa
from pydicom import Dataset
from pynetdicom import evt

from cxr_triton.client.gateway.association import MOST_REPORTED, associate
from cxr_triton.client.gateway.config import Destination, Unreachable
from cxr_triton.client.gateway.dimse import (
    PROCESSING_FAILURE,
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    SUCCESS,
    UNCOMPRESSED,
)
from cxr_triton.client.objects.source import item

SAME_ASSOCIATION_S = 2.0
"""How long an association stays open for an answer to storage commitment."""

OnCommitment = Callable[[str, set[str], dict[str, str]], None]
"""Takes the transaction UID, the SOP instances that are kept, and the failed ones with their reason."""


def take_commitment(event: evt.Event, on_commitment: OnCommitment) -> int:
    """Pass the answer to a storage commitment (PS3.4 table J.3-2) on; the status of the N-EVENT-REPORT."""
    encoded = getattr(event.request, "EventInformation", None)
    if encoded is None or encoded.getbuffer().nbytes > MOST_REPORTED:
        return PROCESSING_FAILURE
    report: Dataset = event.event_information
    kept = {str(result.ReferencedSOPInstanceUID) for result in report.get("ReferencedSOPSequence") or []}
    failed = {
        str(result.ReferencedSOPInstanceUID): f"commitment failed with 0x{int(result.get('FailureReason') or 0):04X}"
        for result in report.get("FailedSOPSequence") or []
    }
    on_commitment(str(report.get("TransactionUID", "")), kept, failed)
    return SUCCESS


def ask_commitment(
    to: Destination, aet: str, rows: Sequence[sa.Row], transaction_uid: str, on_commitment: OnCommitment
) -> None:
    """N-ACTION for results; their answer may come here or later on any association.

    Raises
    ------
    Unreachable
        No association, or the destination refuses.
    """
    answered = []

    def on_report(event: evt.Event) -> tuple[int, None]:
        status = take_commitment(event, on_commitment)
        answered.append(True)
        return status, None

    results = [item(ReferencedSOPClassUID=row.sop_class, ReferencedSOPInstanceUID=row.sop_instance) for row in rows]
    request = item(TransactionUID=transaction_uid, ReferencedSOPSequence=results)
    handlers = [(evt.EVT_N_EVENT_REPORT, on_report)]
    with associate(to, aet, {PUSH_MODEL: UNCOMPRESSED}, handlers) as association:
        try:
            status, _ = association.send_n_action(request, 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
        except (ValueError, RuntimeError):
            raise Unreachable(f"{to.name} has no storage commitment") from None
        if status.get("Status") != SUCCESS:
            said = f"0x{status.Status:04X}" if "Status" in status else "no answer"
            raise Unreachable(f"{to.name} refused storage commitment with {said}")
        ends = time.monotonic() + min(SAME_ASSOCIATION_S, to.timeout_s)
        while not answered and association.is_established and time.monotonic() < ends:
            time.sleep(0.02)
