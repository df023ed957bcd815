"""Run by torchrun from test_parallel.py: gradients of one step, how often they were reduced.

Draws belong to the images (see Fixed), so that any division of a batch has the same.
"""

import sys

import torch

from tests.test_step_options import criterion_for, gradients, images, network
from third_party.common import distributed
from third_party.common.step_options import StepOptions


def main(target):
    distributed.start("cpu")
    rank, world = distributed.rank(), distributed.world_size()
    v = images()
    part = v.chunk(world)[rank]
    results = {}
    for name, K, stack, accumulate in (
        ("plain", None, True, 1),
        ("stacked", 3, True, 1),
        ("series", 3, False, 1),
        ("parts", 3, True, 2),
    ):
        sa = {"K": K, "noise": "shared", "stack": stack} if K else {}
        criterion = criterion_for(network(), v, StepOptions(accumulate=accumulate), **sa)
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
