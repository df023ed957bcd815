"""The host's method names: what a network predicts under each, and the criterion that trains it.

`*_pretrained` (arXiv 2206.07309): the noise network is loaded and frozen; a head for the second
prediction learns on its features. The other methods train both predictions together. The host has
no `pred_eps_ocm_pretrained` (arXiv 2406.10808): it is ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..common.checkpoints import read_state
from ..common.criterion_base import adam
from ..common.schedule import Schedule
from ..common.wrapper import DTWrapper
from .criterions import DTDSDM, DTDSM, OCM, DTDSDMErr


@dataclass(frozen=True)
class Method:
    """One way to train: the criterion (which has the `typ` of its wrapper) and the network."""

    criterion: type[DTDSM]
    pretrained: bool = False

    @property
    def typ(self) -> str:
        """What the network predicts, as a `typ` of the wrapper."""
        return self.criterion.typ

    def trunk_channels(self, image_channels: int) -> int:
        """Output channels of the trunk."""
        joint = issubclass(self.criterion, DTDSDM) and not self.pretrained
        return 2 * image_channels if joint else image_channels

    def head_channels(self, image_channels: int) -> int:
        """Output channels of the head; 0 if the network has no head."""
        return image_channels if self.pretrained else 0


METHODS: dict[str, Method] = {
    "pred_eps": Method(DTDSM),
    "pred_eps_eps2": Method(DTDSDM),
    "pred_eps_epsc": Method(DTDSDMErr),
    "pred_eps_eps2_pretrained": Method(DTDSDM, pretrained=True),
    "pred_eps_epsc_pretrained": Method(DTDSDMErr, pretrained=True),
    "pred_eps_ocm_pretrained": Method(OCM, pretrained=True),
}


def get_method(name: str) -> Method:
    """The method called `name`."""
    if name not in METHODS:
        raise ValueError(f"method={name!r}: must be one of {', '.join(METHODS)}")
    return METHODS[name]


def build_criterion(
    method: str,
    schedule: Schedule,
    model: nn.Module,
    *,
    trunk: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    ratio: float | str = 1.0,
    lr: float = 1e-4,
    grad_clip: float | None = None,
    lr_warmup: int = 0,
    lr_fall: tuple[int, int] | None = None,
    rescale_timesteps: bool = True,
    shift1: bool = False,
) -> DTDSM:
    """The criterion of a method for `model`, with Adam on the trainable parameters.

    trunk       the noise network's weights (a file, or a state dict): needed by `*_pretrained`
    ratio       weight of the second output's loss, or "adaptive"
    grad_clip   largest norm of the gradient, None for no limit
    lr_warmup   steps over which the rate rises to `lr`; 0: constant, as in the host
    lr_fall     two steps, between which the rate falls to 0; None: as in the host
    """
    chosen = get_method(method)
    if chosen.pretrained and trunk is None:
        raise ValueError(f"trunk=None: {method} needs the weights of a trained noise network")
    if trunk is not None:
        if not chosen.pretrained:
            raise ValueError(f"trunk: {method} trains the whole network, give None")
        load_trunk(model, trunk)
    states = (
        DTWrapper(model, chosen.typ, rescale_timesteps, shift1, schedule.N),
        {"model": model},
        *adam(model, lr, grad_clip, lr_warmup, lr_fall),
    )
    if issubclass(chosen.criterion, DTDSDM):
        criterion: DTDSM = chosen.criterion(schedule, ratio, *states)
    else:
        criterion = chosen.criterion(schedule, *states)
    criterion.grad_clip = grad_clip
    return criterion


def load_trunk(model: nn.Module, trunk: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Load a noise network's weights into the frozen part of `model`; its head may be missing.

    A frozen parameter without a value would always stay random. A value without a parameter belongs
    to another network. Both are refused.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    if not trainable or not frozen:
        raise ValueError(
            f"model={type(model).__name__}: must have a frozen trunk and a trainable head; it has "
            f"{len(frozen)} frozen and {len(trainable)} trainable parameters"
        )
    source = "trunk" if isinstance(trunk, Mapping) else f"trunk={os.path.abspath(trunk)}"
    state = trunk if isinstance(trunk, Mapping) else read_state(trunk)
    expected = model.state_dict()
    shared = [name for name in state if name in expected]
    problems = {
        "lacks": [name for name in expected if name not in state and name not in trainable],
        "has unknown": [name for name in state if name not in expected],
        "has other shapes for": [n for n in shared if state[n].shape != expected[n].shape],
    }
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            listing = ", ".join(names[:10]) + more
            raise ValueError(f"{source} does not fit the network: it {what} {listing}")
    model.load_state_dict(dict(state), strict=False)
