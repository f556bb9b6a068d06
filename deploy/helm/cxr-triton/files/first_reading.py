"""Startup probe: all models of the server are ready, and it reads a phantom.

first_reading.py HOST:PORT LIMIT_S
"""

import sys

from cxr_triton.client import Reader, Timeouts
from cxr_triton.errors import CxrError
from cxr_triton.phantom import png_files
from cxr_triton.triton_repo.guard import is_ready


def reads(url: str, limit_s: float) -> str:
    """Why there is no reading; empty where there is one, cut short after a few tokens."""
    if not is_ready(url):
        return "not ready"
    (image,) = png_files(1, 0, "mimic_jpg")
    try:
        with Reader(url, timeouts=Timeouts(first_delta_s=limit_s, total_s=limit_s)) as reader:
            reader.read([image], max_new_tokens=8).result()
    except CxrError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(reads(sys.argv[1], float(sys.argv[2])) or 0)
