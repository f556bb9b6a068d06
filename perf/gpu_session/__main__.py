"""`python -m cxr_triton.perf.gpu_session`."""

from cxr_triton.perf.gpu_session.command import main

if __name__ == "__main__":
    main()
