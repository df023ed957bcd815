"""Analytic-DPM (arXiv 2201.06503) with the SA loss.

python -m adapters.analytic_dpm --config configs/FILE.py
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from adapters.allocator import keep_freed_memory
from adapters.experiment import Adapter, run
from third_party.analytic_dpm.criterions import DDPMDSM, build_criterion
from third_party.common.schedule import Schedule


def _build_criterion(
    method: str, schedule: Schedule, model: nn.Module, *, trunk: None, ratio: float, **options: Any
) -> DDPMDSM:
    """Ignore method, trunk and ratio: this host has one method and no head."""
    return build_criterion(schedule, model, **options)


ANALYTIC_DPM = Adapter(
    module="adapters.analytic_dpm",
    needs="gamma",
    build_criterion=_build_criterion,
)

if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(run(ANALYTIC_DPM))
