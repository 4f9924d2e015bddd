"""Temporal layers of a MODEL: quantized, answered from a cache, saved as a table, reported."""
