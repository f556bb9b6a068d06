"""Before a server's container ends: wait until nobody sends it anything new, then until it reads nothing any more.

drain.py METRICS SETTLE_S LIMIT_S
"""

import re
import sys
import time
import urllib.request

QUIET_LOOKS = 5  # a second apart: what is between two models is neither pending nor a stream
BUSY = re.compile(
    r"^(?:cxr_decoder_streams|nv_inference_pending_request_count)(?:\{[^}]*\})?\s+(\S+)\s*$", re.MULTILINE
)


def under_way(url: str) -> float:
    """Readings that wait or run; 0 where no server answers any more."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  # that of the pod
            return sum(map(float, BUSY.findall(answer.read().decode())))
    except OSError:
        return 0.0


def drain(url: str, settle_s: float, limit_s: float) -> bool:
    """Whether nothing was under way any more within the limit."""
    time.sleep(settle_s)
    end, quiet = time.monotonic() + limit_s, 0
    while time.monotonic() < end:
        quiet = quiet + 1 if under_way(url) == 0 else 0
        if quiet == QUIET_LOOKS:
            return True
        time.sleep(1)
    return False


if __name__ == "__main__":
    sys.exit(not drain(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
