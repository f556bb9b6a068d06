"""A reading room in the browser, in front of served `cxr_reader`s: `cxr-triton ui`."""
