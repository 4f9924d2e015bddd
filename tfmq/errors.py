"""The one exception whose text is meant for the person at the graph."""


class TfmqError(Exception):
    """One sentence: what is wrong, where, and what to do about it."""
