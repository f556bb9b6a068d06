"""The forms in which an export can hold the decoder: each writer's module names its own."""

from cxr_triton.export import decoder, folder, tensorrt_llm

FORMS = {form.name: form for form in (decoder.FORM, tensorrt_llm.FORM, folder.FORM)}
"""The first is the default."""
