"""Paired image metrics, side-by-side sheets and the HTML report."""
