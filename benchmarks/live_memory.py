"""Memory that tensors of a training step hold at once: python -m benchmarks.live_memory

Every tensor that an operator returns counts until its storage is released, in the forward and the
backward pass. The weights, their average and Adam's state are added. Steps run on PyTorch's "meta"
device, which computes only shapes. So any batch of any network takes seconds, and the numbers are
the same on every machine. Workspaces of kernels and an allocator's reserve are not counted.
"""

from __future__ import annotations

import argparse
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import NETWORKS, make_network
from benchmarks.training import parse_variants
from benchmarks.training_steps import HOST, Variant
from sa_plugin import attach
from third_party.extended_analytic_dpm.methods import build_criterion


class LiveMemory(TorchDispatchMode):
    """In this context, ``peak`` is the most bytes that newly made tensors held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self._now -= size


def peak_of(evaluate: Callable[[], Tensor], model: nn.Module) -> int:
    """Peak bytes of ``evaluate()`` and its backward pass, with weights and optimiser state."""
    model.zero_grad(set_to_none=True)
    with LiveMemory() as memory:
        evaluate().mean().backward()
    weights = sum(p.nbytes for p in model.parameters())
    return memory.peak + 4 * weights  # the weights, their average, Adam's two moments


def step_peak(row: Variant, network: str, batch: int) -> int:
    """Peak bytes of a training step of the port's criterion."""
    model = make_network(network, "meta")
    criterion = build_criterion("pred_eps", HOST, model)
    v = torch.zeros(batch, *NETWORKS[network][1], device="meta")
    loss = row.loss()
    if loss is not None:
        attach(criterion, loss)
    return peak_of(lambda: criterion.objective(v), model)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=sorted(NETWORKS), default="cifar10")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--variants",
        type=parse_variants,
        default="plain,all:2,all:4,one:2,one:4",
        help="as in benchmarks.training, without options; ratios are to the first (%(default)s)",
    )
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*meta.*")
    print(f"{args.network}, batch {args.batch}, PyTorch {torch.__version__}\n")
    print("| step | MiB at most | of the first |\n|---|--:|--:|")
    first = None
    for row in args.variants:
        peak = step_peak(row, args.network, args.batch)
        first = first or peak
        print(f"| {row.title} | {peak / 2**20:.0f} | {peak / first:.2f} |")


if __name__ == "__main__":
    main()
