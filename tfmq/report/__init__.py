"""Paired image metrics, side-by-side sheets and plots."""
