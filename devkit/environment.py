"""The environment of the processes that are started here. Standard library only."""

import os


def environment(timed: bool = False, **more: str) -> dict[str, str]:
    """This process's environment, what every process of ours needs, and `more`. timed: threads as users have them."""
    # Threads that spin while they wait slow a shared machine down by an order of magnitude.
    waiting = {} if timed else {"OMP_WAIT_POLICY": "PASSIVE"}
    return {**waiting, **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **more}
