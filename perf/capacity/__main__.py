"""`python -m cxr_triton.perf.capacity`."""

from cxr_triton.perf.capacity.command import main

if __name__ == "__main__":
    main()
