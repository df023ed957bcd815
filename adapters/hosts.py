"""The hosts, and the reverse processes that each of them can sample with: one table of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ml_collections import FrozenConfigDict
from torch import nn

from sa_plugin.effect.chains import CLOSED
from third_party.analytic_dpm import criterions as analytic
from third_party.common.criterion_base import Criterion
from third_party.common.schedule import Schedule
from third_party.extended_analytic_dpm.methods import build_criterion


@dataclass(frozen=True)
class Adapter:
    """What is specific to a host.

    Attributes:
        module: the command that runs it, ``python -m MODULE``.
        needs: what its optimal variance needs besides the noise network: a second output, "eps2"
            (SN-DPM), "epsc" (NPR-DPM) or "ocm" (OCM-DPM), or "gamma" (Analytic-DPM).
        pretrained, joint: the host's methods that train a second output, if it needs one: after
            the noise network, or together with it.
        build_criterion: makes the host's criterion; it takes the arguments of the function of that
            name in ``third_party.extended_analytic_dpm.methods``.
    """

    module: str
    needs: str
    pretrained: str | None = None
    joint: str | None = None
    build_criterion: Callable[..., Criterion] = build_criterion

    @property
    def name(self) -> str:
        """Its short name, as in names of configurations and folders, such as "sn"."""
        return self.module.removeprefix("adapters.").removesuffix("_dpm")

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of its stages in order."""
        return "base", "head" if self.pretrained else "gamma", "sample", "evaluate"

    def recorded(self, config: FrozenConfigDict) -> FrozenConfigDict:
        """The configuration without the sections of stages that the host does not have."""
        without = {"head", "gamma"} - set(self.stages)
        return FrozenConfigDict({k: v for k, v in config.to_dict().items() if k not in without})


def _build_criterion(
    method: str, schedule: Schedule, model: nn.Module, *, trunk: None, ratio: float, **options: Any
) -> Criterion:
    """Ignore method, trunk and ratio: this host has one method and no head."""
    return analytic.build_criterion(schedule, model, **options)


SN_DPM = Adapter(
    module="adapters.sn_dpm",
    needs="eps2",
    pretrained="pred_eps_eps2_pretrained",
    joint="pred_eps_eps2",
)
NPR_DPM = Adapter(
    module="adapters.npr_dpm",
    needs="epsc",
    pretrained="pred_eps_epsc_pretrained",
    joint="pred_eps_epsc",
)
OCM_DPM = Adapter(
    module="adapters.ocm_dpm",
    needs="ocm",
    pretrained="pred_eps_ocm_pretrained",
)
ANALYTIC_DPM = Adapter(
    module="adapters.analytic_dpm",
    needs="gamma",
    build_criterion=_build_criterion,
)
HOSTS = (SN_DPM, NPR_DPM, OCM_DPM, ANALYTIC_DPM)


def host_of(needs: Iterable[str | None]) -> Adapter:
    """The first host that provides one of ``needs``; SN-DPM where nothing is needed.

    DDPM and DDIM work with any host.
    """
    wanted = set(needs)
    return next((host for host in HOSTS if host.needs in wanted), SN_DPM)


@dataclass(frozen=True)
class ReverseProcess:
    """A row of the tables: the sampler's forward process and variance.

    ``needs``: what its optimal variance needs besides the noise network: a second output ("eps2"
    for SN, "epsc" for NPR, "ocm") or "gamma" (Analytic); None where the network alone serves.
    ``solver``: of ``sa_plugin.integrations.diffusers.solvers``, in place of the sampler's steps.
    """

    title: str
    forward: str
    variance: str
    needs: str | None = None
    solver: str | None = None

    @property
    def is_optimal(self) -> bool:
        """Whether its variance holds an estimate of Cov[x_0 | x_t]."""
        return self.variance not in ("small", "big")

    @property
    def has_closed_form(self) -> bool:
        """Whether ``sa_plugin.effect.chains`` knows its chains for Gaussian data."""
        return self.solver is None and self.variance in CLOSED


PROCESSES: dict[str, ReverseProcess] = {
    "ddpm_small": ReverseProcess("DDPM small", "ddpm", "small"),
    "ddpm_big": ReverseProcess("DDPM big", "ddpm", "big"),
    "ddim": ReverseProcess("DDIM", "ddim", "small"),
    "analytic_ddpm": ReverseProcess("Analytic-DDPM", "ddpm", "analytic", "gamma"),
    "analytic_ddim": ReverseProcess("Analytic-DDIM", "ddim", "analytic", "gamma"),
    "npr_ddpm": ReverseProcess("NPR-DDPM", "ddpm", "npr", "epsc"),
    "npr_ddim": ReverseProcess("NPR-DDIM", "ddim", "npr", "epsc"),
    "sn_ddpm": ReverseProcess("SN-DDPM", "ddpm", "sn", "eps2"),
    "sn_ddim": ReverseProcess("SN-DDIM", "ddim", "sn", "eps2"),
    "ocm_ddpm": ReverseProcess("OCM-DDPM", "ddpm", "ocm", "ocm"),
    "ocm_ddim": ReverseProcess("OCM-DDIM", "ddim", "ocm", "ocm"),
    "probes_ddpm": ReverseProcess("Probes-DDPM", "ddpm", "probes"),
    "probes_ddim": ReverseProcess("Probes-DDIM", "ddim", "probes"),
    "lanczos_ddpm": ReverseProcess("Lanczos-DDPM", "ddpm", "lanczos"),
    "lanczos_ddim": ReverseProcess("Lanczos-DDIM", "ddim", "lanczos"),
    "ddim_solver": ReverseProcess("DDIM, solvers' steps", "ddim", "small", solver="ddim"),
    "dpm_solver": ReverseProcess("DPM-Solver++(2M)", "ddim", "small", solver="dpm_solver"),
    "unipc": ReverseProcess("UniPC", "ddim", "small", solver="unipc"),
    "deis": ReverseProcess("DEIS", "ddim", "small", solver="deis"),
    "ipndm": ReverseProcess("iPNDM", "ddim", "small", solver="ipndm"),
}


def get_process(name: str) -> ReverseProcess:
    """The reverse process called ``name``; a ValueError lists the known names."""
    if name not in PROCESSES:
        raise ValueError(f"sample.processes must be among {sorted(PROCESSES)}, got {name!r}")
    return PROCESSES[name]
