"""The verification gate: an engine bundle against its unquantized checkpoint, the record and its page."""
