"""What a deployment needs, looked at: small checks that find what is there, what is wanted, and what to do."""
