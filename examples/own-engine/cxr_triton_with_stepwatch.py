"""`cxr-triton` with one more engine in its table of rooms."""

from cxr_triton.cli import main
from cxr_triton.engines import ROOMS

ROOMS["stepwatch"] = "stepwatch"  # the module beside this file

if __name__ == "__main__":
    main(prog_name="cxr-triton")
