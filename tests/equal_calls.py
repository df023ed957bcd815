"""One of two processes for test_parallel.py: a window that is masked on the first alone.

The network is a stock DistributedDataParallel with a buffer, which it exchanges in every call.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sa_plugin import NoiseSchedule, SALoss
from third_party.common import distributed


class Network(torch.nn.Conv2d):
    """A convolution with a buffer."""

    def __init__(self) -> None:
        super().__init__(1, 1, 3, padding=1)
        self.register_buffer("exchanged", torch.zeros(1))

    def forward(self, x, n):
        """The steps have no part in it."""
        return super().forward(x)


dist.init_process_group("gloo", timeout=timedelta(seconds=30))
torch.manual_seed(0)
model = DistributedDataParallel(Network())
for stack in (True, False):
    for backprop in ("one", "all"):
        loss = SALoss(NoiseSchedule.linear(30), K=3, backprop=backprop, stack=stack)
        n = torch.tensor([1 if dist.get_rank() == 0 else 9])
        loss(model, torch.zeros(1, 1, 4, 4), n=n, anchor=n).total.backward()
distributed.stop()  # reached by both, or by none within the time
