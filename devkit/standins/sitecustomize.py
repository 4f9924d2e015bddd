"""Python imports this at start when its folder is on PYTHONPATH: stand-ins, and no host without its owner."""

import os
import threading
import time

import tfmq_standins

tfmq_standins.install()


def _end_with_owner(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(1)
    os._exit(1)


if os.environ.get("TFMQ_OWNER") == str(os.getppid()):
    # A killed test run must not leave its server behind. (Windows keeps the parent's id: there nothing happens.)
    threading.Thread(target=_end_with_owner, args=(os.getppid(),), daemon=True).start()
