"""Integer operations: one table, one file per backend; `reference.py` is the truth for all others."""
