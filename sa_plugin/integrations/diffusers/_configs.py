"""The configuration of a diffusers scheduler in the arguments of ``OptimalVarianceScheduler``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

# The schedulers that can be replaced: they have one kind of forward process and of network.
FORWARDS = {
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "EulerAncestralDiscreteScheduler": "ddpm",
    "KDPM2AncestralDiscreteScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "ddim",
    "DPMSolverSinglestepScheduler": "ddim",
    "DEISMultistepScheduler": "ddim",
    "UniPCMultistepScheduler": "ddim",
    "EulerDiscreteScheduler": "ddim",
    "HeunDiscreteScheduler": "ddim",
    "LMSDiscreteScheduler": "ddim",
    "KDPM2DiscreteScheduler": "ddim",
}
DDPM = ("DDPMScheduler", "DDPMParallelScheduler")
DDIM = ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler")  # their steps span T // steps
# "fixed_small_log" is the same to DDPMScheduler, "fixed_large_log" gives it no number.
VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "big",
    "learned_range": "iddpm",
}
# Options that move noise levels off the T steps of the schedule, with the value that does not.
OFF_THE_STEPS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
    "sigma_min": None,
    "sigma_max": None,
    "shift_terminal": None,
    "timestep_type": "discrete",
    "lambda_min_clipped": -float("inf"),
}


def arguments_of(
    config: Mapping[str, Any], given: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments, among those called ``own``, that do what the scheduler of ``config`` does.

    None are needed where ``config`` holds such arguments itself, perhaps kept by other schedulers.

    Args:
        config: of a scheduler of diffusers; its own entries come before those that it only keeps.
        given: what the user chose beside it. It replaces entries of ``config``.

    Raises:
        ValueError: a scheduler of another kind, or an option that cannot be kept.
    """
    names = _sources(config)
    if "trajectory" in config or (not names and {*config} <= {*own}):
        return {}
    if not names:
        raise ValueError(
            "config must be of a DDPM, DDIM, PNDM, DPM-Solver, DEIS, UniPC, Euler, Heun, LMS or "
            "KDPM2 scheduler (flow matching, EDM and others have another forward process), got "
            f"{config.get('_class_name') or [*config]}"
        )
    theirs = {key: config.get(key, value) for key, value in _defaults(names[0]).items()}
    theirs |= {key: value for key, value in given.items() if key in theirs}
    for key, kept in OFF_THE_STEPS.items():
        if theirs.get(key, kept) not in (kept, None):
            raise ValueError(
                f"{key} must be {kept} in the config of {names[0]}, got {theirs[key]!r}: it cannot "
                f"be kept; from_config(..., {key}={kept}) leaves it out"
            )
    # The other schedulers do not clip, and their last step ends as final_sigmas_type says.
    found = {"clip_sample": False, "timestep_spacing": "linspace"}
    found["set_alpha_to_one"] = theirs.get("final_sigmas_type") != "sigma_min"
    found |= {key: value for key, value in theirs.items() if key in own}
    found["forward"] = given.get("forward") or _forward(names, theirs)
    if found["timestep_spacing"] == "linspace" and names[0] not in (*DDPM, *DDIM):
        found["trajectory"] = "linear"  # from T - 1 to 0; each step ends at the next one
    if names[0] in DDPM and "variance" not in given:
        if theirs["variance_type"] not in VARIANCES:
            raise ValueError(
                f"variance_type must be one of {tuple(VARIANCES)}, got "
                f"{theirs['variance_type']!r}; from_config(..., variance=...) replaces it"
            )
        found["variance"] = VARIANCES[theirs["variance_type"]]
    return found


def _sources(config: Mapping[str, Any]) -> list[str]:
    """The classes that ``config`` may be of: a scheduler in memory does not say its name."""
    if "_class_name" in config:
        return [name for name in FORWARDS if name == config["_class_name"]]
    keys = [key for key in config if not key.startswith("_")]
    return [n for n in FORWARDS if (own := [*_defaults(n)]) and keys[: len(own)] == own]


def _defaults(name: str) -> dict[str, Any]:
    """The arguments of a scheduler with their defaults; none where this diffusers has no such."""
    scheduler = getattr(diffusers, name, None)
    parameters = inspect.signature(scheduler).parameters.values() if scheduler else ()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def _forward(names: list[str], theirs: Mapping[str, Any]) -> str:
    found = {FORWARDS[name] for name in names}
    if len(found) > 1:
        raise ValueError(
            f"forward must be 'ddpm' or 'ddim' for a config that may be of {', '.join(names)}, "
            "got None"
        )
    sde = str(theirs.get("algorithm_type", "")).startswith("sde")
    return "ddpm" if sde else found.pop()
