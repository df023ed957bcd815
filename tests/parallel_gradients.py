"""Run by torchrun from test_parallel.py: gradients of one step, how often they were reduced.

Draws belong to the images (see Fixed), so that any division of a batch has the same.
"""

import sys

import torch

from tests.third_party.test_step_options import criterion_for, gradients, images, network
from third_party.common import distributed
from third_party.common.step_options import StepOptions


def main(target):
    distributed.start("cpu")
    rank, world = distributed.rank(), distributed.world_size()
    v = images().double()
    part = v.chunk(world)[rank]
    results = {}
    for name, sa, accumulate, net in (
        ("plain", {}, 1, {}),
        ("stacked", {"K": 3}, 1, {}),
        ("series", {"K": 3, "stack": False}, 1, {}),
        ("parts", {"K": 3}, 2, {}),
        ("one", {"K": 3, "backprop": "one"}, 1, {}),
        ("one in series", {"K": 4, "backprop": "one", "stack": False}, 1, {}),
        ("one in parts", {"K": 3, "backprop": "one"}, 2, {}),
        ("reuse", {"K": 3, "reuse": True}, 1, {}),
        ("activations not kept", {"K": 3, "stack": False}, 1, {"use_checkpoint": True}),
    ):
        sa = sa and {"noise": "shared", **sa}
        criterion = criterion_for(
            network(**net).double(), v, StepOptions(accumulate=accumulate), **sa
        )
        reductions = []
        if world > 1:
            criterion.parallelise()

            def reduce(_, bucket, reductions=reductions):
                reductions.append(bucket.index())
                torch.distributed.all_reduce(bucket.buffer())
                future = torch.futures.Future()
                future.set_result(bucket.buffer() / world)
                return future

            criterion._parallel[0].register_comm_hook(None, reduce)
        results[name] = {"gradients": gradients(criterion, part), "reductions": len(reductions)}
    own = {"seed": distributed.own_seed(7), "results": results}
    everyone = distributed.gather(own)
    if distributed.is_first():
        torch.save(everyone, target)
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1])
