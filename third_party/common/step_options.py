"""How a training step is computed, for any objective: layout, precision, parts of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PRECISIONS: dict[str, torch.dtype | None] = {
    "float32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class StepOptions:
    """Options of `Criterion.configure`; the defaults give the host's own step.

    channels_last  memory layout of weights and images with the channels of a pixel side by side:
                   the same names and shapes, sums in another order
    compile        compile the network with torch.compile
    precision      "float32", or autocast to "bf16" or "fp16" (with a gradient scaler); weights,
                   optimiser and loss stay float32
    accumulate     number of parts of a batch, computed one after the other: less memory, the same
                   gradient up to rounding (except if the objective uses the whole batch, as the
                   "adaptive" ratio does)
    """

    channels_last: bool = False
    compile: bool = False
    precision: str = "float32"
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r}: must be one of {', '.join(PRECISIONS)}"
            )
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate!r}: must be at least 1")

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None: autocast is off."""
        return PRECISIONS[self.precision]

    def check_batch(self, batch_size: int) -> None:
        """ValueError unless the batch of one process can be split into equal parts."""
        if batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate}: must divide the batch of a process, {batch_size}"
            )
