"""Temporal features: where a network learns *when* it is, and how to keep that exact."""
