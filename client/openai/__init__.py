"""OpenAI's chat completions over HTTP, in front of a served `cxr_reader`: `cxr-triton openai`."""
