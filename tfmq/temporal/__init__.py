"""Temporal features: where a network learns *when* it is, and how to keep that exact.

`tib` finds the Temporal Information Block by a table (`architectures`), `probe` finds it without one.
"""
