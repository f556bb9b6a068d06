"""One session on a GPU machine without internet: which engines run there, whether they agree, how fast they are.

    python -m cxr_triton.perf.gpu_session pack WHEELS -o LOADS    what travels, in loads, with one GPU's kernels only
    python -m cxr_triton.perf.gpu_session unpack LOAD TARGET      there
    python -m cxr_triton.perf.gpu_session run OUT                 checks, then every step in a process of its own
    python -m cxr_triton.perf.gpu_session run OUT --dry-run       the same on a CPU, with a small model

A step writes each row as it is measured, so that one that runs out of time leaves what it had; what a step leaves of
its seconds is not given to the others. docs/gpu-session.md has the plan.
"""
