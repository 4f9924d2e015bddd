"""Python imports this at start when its folder is on PYTHONPATH: see `tfmq_standins.py`."""

import tfmq_standins

tfmq_standins.install()
