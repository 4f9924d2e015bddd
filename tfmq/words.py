"""Words for people."""


def counted(count: int, noun: str) -> str:
    """ "1 layer", "2 layers": for a noun that takes an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
