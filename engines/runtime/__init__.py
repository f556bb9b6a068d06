"""Many generations at once on one decoder: streams, their batching, sampling."""
