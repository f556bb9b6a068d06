"""From the bytes of one untrusted file to the patches that a model sees."""
