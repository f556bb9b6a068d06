"""What HTTP services in front of served `cxr_reader`s share: `cxr-triton openai` and `cxr-triton ui`."""
