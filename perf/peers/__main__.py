"""`python -m cxr_triton.perf.peers`: what `cxr_triton.perf.beside` says."""

import importlib

if __name__ == "__main__":
    importlib.import_module("cxr_triton.perf.beside").main()
