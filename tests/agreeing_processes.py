"""One of two processes for test_signals.py: prints where it stops, and what it then meets."""

import os
import sys

from third_party.common import distributed

distributed.start("cpu")
agreement = distributed.Agreement()
for step in range(1, 100):
    if agreement(distributed.rank() == 1 and step >= 5):
        print("stops at", step)
        break
distributed.gather(None)
sys.stdout.flush()
if distributed.rank() == 1:
    os._exit(0)
try:
    with distributed.peers():
        for _ in range(100):
            agreement(False)
            distributed.gather(None)
except ConnectionError as error:
    print(error)
