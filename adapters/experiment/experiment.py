"""An experiment: a checked configuration, with its folder, its device and what it builds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import FrozenConfigDict
from torch import Tensor, nn

from adapters.checkpoints.fitting import read_fitting
from adapters.hosts import Adapter, get_process
from adapters.sampling.pipeline import Source, in_slices, slice_size
from adapters.sampling.solvers import solver_sampler
from sa_files.whole import is_whole
from sa_plugin.loss import SALoss
from sa_plugin.sampling.gamma import Gamma
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.schedule import NoiseSchedule
from third_party.common import distributed
from third_party.common.classes import Classes, Guided
from third_party.common.data import (
    ImageDataset,
    check_world,
    spread_images,
    spread_rows,
    to_unit_range,
)
from third_party.common.datasets import IMAGE_SHAPES, get_dataset
from third_party.common.nets.by_name import build_network
from third_party.common.schedule import NamedSchedule
from third_party.common.step_options import StepOptions
from third_party.common.wrapper import DTWrapper
from third_party.extended_analytic_dpm.methods import get_method

# Keys of the section data that only folders have; datasets get them at other values than these.
OF_FOLDERS = {"size": 0, "channels": 3, "follow_links": False}
# Makes the function that the sampler calls of the network's function of (x_n, n).
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Experiment:
    """A checked configuration, with its folder and its device.

    ``load``: takes the arguments of ``load_dataset`` and returns the images; callers that have
    loaded the images already can pass them on with it.

    Raises:
        ValueError: a value is not possible. Nothing has been written then.
    """

    def __init__(
        self,
        adapter: Adapter,
        config: FrozenConfigDict,
        workdir: Path,
        device: str = "cpu",
        progress: bool = True,
        *,
        load: Callable[..., ImageDataset] | None = None,
    ) -> None:
        self.adapter = adapter
        self._load = load or load_dataset
        self.config = config
        self.workdir = workdir
        self.device = _usable_device(device)
        self.progress = progress
        self.replaced: frozenset[Path] = frozenset()  # results that a run would replace
        self.host_schedule = NamedSchedule(config.schedule.name, config.schedule.N)
        self.schedule = NoiseSchedule.from_betas(self.host_schedule.betas[1:])
        options = config.sa.to_dict()
        self.lam_warmup = options.pop("lam_warmup")
        perturbation = config.base.input_perturbation
        self.loss = SALoss(self.schedule, input_perturbation=perturbation, **options)
        self._check()

    @property
    def is_joint(self) -> bool:
        """Whether the base stage trains both outputs of one network."""
        return self.adapter.joint is not None and self.config.head.training == "joint"

    @property
    def base_method(self) -> str:
        """The host's method of the base stage."""
        return self.adapter.joint if self.is_joint else "pred_eps"

    @cached_property
    def dataset(self) -> ImageDataset:
        """The training images, loaded on first use."""
        return self._load(self.config.data)

    @cached_property
    def reference(self) -> ImageDataset:
        """The images that metrics compare with."""
        split = self.config.evaluate.reference
        return self._load(self.config.data, split=split) if split else self.dataset

    def has(self, path: Path) -> bool:
        """Whether a result is there and whole, and stays."""
        return self.replaced.isdisjoint((path, *path.parents)) and is_whole(path)

    @cached_property
    def classes(self) -> Classes | None:
        """The classes of the training images; None unless the network knows them."""
        data = self.config.data
        return Classes.of(data.name, self.dataset) if data.labels else None

    @property
    def label_rows(self) -> int | None:
        """Rows of the network's label embedding: the classes, and the null class if it is used."""
        return self.classes and len(self.classes) + (self.config.base.label_drop > 0)

    def labels_of(self, images: ImageDataset, rows: Any = slice(None)) -> dict[str, Tensor]:
        """What the network gets beside these rows of the images: their labels y, or nothing.

        The images are those of the training, or of another split.
        """
        if self.classes is None:
            return {}
        return {"y": Classes.of(self.config.data.name, images).labels[rows].to(self.device)}

    def examples(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Training images from all parts of the set, and what the network gets beside them.

        At most ``count``, [n,C,H,W] in [-1, 1], on the device.
        """
        images = to_unit_range(spread_images(self.dataset, count)).to(self.device)
        return images, self.labels_of(self.dataset, spread_rows(len(self.dataset), count))

    def labels_of_samples(self, first: int, count: int, seed: int) -> dict[str, Tensor]:
        """The same for the samples first..first + count - 1."""
        if self.classes is None:
            return {}
        which = self.config.sample.classes
        return {"y": self.classes.of_samples(which, seed, first, count).to(self.device)}

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W); the files are read only where the dataset has no fixed size."""
        known = IMAGE_SHAPES.get(self.config.data.name)
        return self.dataset.image_shape if known is None else known

    def network(self, method: str, device: str | torch.device | None = None) -> nn.Module:
        """A new network for one of the host's methods, initialised from the run's seed."""
        chosen, channels = get_method(method), self.image_shape[0]
        with torch.random.fork_rng(devices=[]), torch.device(device or "cpu"):
            torch.manual_seed(self.config.seed)
            return build_network(
                self.config.network.name,
                self.config.network.args.to_dict(),
                self.image_shape,
                trunk_channels=chosen.trunk_channels(channels),
                head_channels=chosen.head_channels(channels),
                head_mode=self.config.head.mode,
                num_classes=self.label_rows,
            )

    def wrapper(self, network: nn.Module, typ: str) -> DTWrapper:
        """The network as a function of (x_n, n), and of y if it has classes."""
        time = self.config.time
        return DTWrapper(network, typ, time.rescale_timesteps, time.shift1, self.schedule.N)

    def sampler(
        self,
        process: str,
        steps: int,
        network: nn.Module,
        typ: str,
        gamma: Gamma | None = None,
        *,
        call: Wrap = lambda wrapper: wrapper,
    ) -> Sampler:
        """The sampler of a row and a column of the tables; ``call`` may wrap the network."""
        row, sample = get_process(process), self.config.sample
        function: Callable[..., Any] = self.wrapper(network, typ)
        if sample.guidance:
            function = Guided(function, typ, sample.guidance, self.classes.null)
        shared: dict[str, Any] = {
            "steps": steps,
            "trajectory": sample.trajectory,
            "clip_x0": sample.clip_x0,
            "device": self.device,
            "channels_last": sample.channels_last,
            "autocast": None if sample.precision == "float32" else sample.precision,
            "compile": sample.compile,
        }
        if row.solver:
            make = solver_sampler()
            return make(call(function), self.schedule, solver=row.solver, **shared)
        return Sampler(
            call(function),
            self.schedule,
            gamma=gamma,
            forward=row.forward,
            variance=row.variance,
            avg_cov=sample.avg_cov and row.variance != "lanczos",
            clip_sigma_idx=sample.clip_sigma_idx if row.is_optimal else 0,
            clip_pixel=sample.clip_pixel_ddpm if row.forward == "ddpm" else sample.clip_pixel_ddim,
            probes=sample.probes,
            lanczos_steps=sample.lanczos_steps,
            **shared,
        )

    def source(
        self,
        process: str,
        steps: int,
        network: nn.Module,
        typ: str,
        gamma: Gamma | None = None,
        *,
        call: Wrap = lambda wrapper: wrapper,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> Source:
        """The images of a row and a column of the tables, by default from ``sample.seed``."""
        multiple = slice_size(self.image_shape) if self.device.type == "cpu" else 1

        seed = self.config.sample.seed if seed is None else seed

        def sliced(function: Callable[..., Any]) -> Callable[..., Any]:
            return in_slices(call(function), multiple) if multiple > 1 else call(function)

        return Source(
            self.sampler(process, steps, network, typ, gamma, call=sliced),
            self.image_shape,
            seed=seed,
            given=partial(self.labels_of_samples, seed=seed),
            batch_size=self.config.sample.batch_size,
            multiple=multiple,
            progress=self.progress if progress is None else progress,
        )

    def step_options(self, name: str) -> StepOptions:
        """How the steps of the training called ``name`` are computed."""
        settings, world = self.config[name], distributed.world_size()
        keys = ("channels_last", "compile", "precision", "accumulate")
        options = StepOptions(**{key: settings[key] for key in keys})
        check_world(settings.batch_size, world)
        options.check_batch(settings.batch_size // world)
        return options

    def _check(self) -> None:
        """ValueError unless the keys, the images and the host fit each other."""
        config, adapter = self.config, self.adapter
        self._check_data()
        if adapter.pretrained and not adapter.joint and config.head.training == "joint":
            raise ValueError(
                f"head.training must be 'pretrained' for {adapter.module}, which derives a frozen "
                "network, got 'joint'"
            )
        if self.is_joint and config.base.input_perturbation:
            raise ValueError(
                "base.input_perturbation must be 0 with head.training = 'joint', whose second "
                f"output is of x_n itself, got {config.base.input_perturbation:g}"
            )
        self._check_training("base", self.base_method)
        if adapter.pretrained is not None and not self.is_joint:
            self._check_training("head", adapter.pretrained)
        network = self.network(self.base_method, "meta")
        gamma = np.ones(self.schedule.N + 1) if adapter.needs == "gamma" else None
        for name in config.sample.processes:
            needs = get_process(name).needs
            if needs not in (None, adapter.needs):
                raise ValueError(
                    f"sample.processes: {name!r} needs {needs!r}, which {adapter.module} "
                    "does not provide"
                )
            for steps in config.sample.steps:
                self.sampler(name, steps, network, "eps", gamma)
        _check_images(config.network, self.image_shape, self.label_rows)

    def _check_data(self) -> None:
        """ValueError unless the keys of classes and of crops fit the data and each other."""
        data, sample, drop = self.config.data, self.config.sample, self.config.base.label_drop
        if data.crop and not (data.name == "folder" and data.size):
            raise ValueError(
                "data.crop takes data.name = 'folder' with data.size > 0, got "
                f"{data.name!r} with {data.size}"
            )
        if sample.guidance and not drop:
            raise ValueError(
                "sample.guidance needs base.label_drop > 0, with which the network learns the null "
                f"class, got {drop:g}"
            )
        if self.classes is not None:
            self.classes.check_choice(sample.classes)
            if "num_classes" in self.config.network.args:
                raise ValueError("network.args must not hold num_classes: data.labels sets it")
        elif drop or sample.classes != "data":
            name = "base.label_drop" if drop else "sample.classes"
            raise ValueError(f"{name} needs data.labels = True, got False")

    def _check_training(self, name: str, method: str) -> None:
        """ValueError unless the network can be built and the training's settings fit it."""
        settings, network = self.config[name], self.network(method, "meta")
        if settings.iterations < 1 and not settings.init_from:
            raise ValueError(
                f"{name}.iterations must be >= 1, or 0 to use {name}.init_from unchanged, "
                f"got {settings.iterations}"
            )
        if settings.lr_decay > settings.iterations:
            raise ValueError(
                f"{name}.lr_decay must be <= {name}.iterations = {settings.iterations}, "
                f"got {settings.lr_decay}"
            )
        if settings.init_from:
            read_fitting(settings.init_from, network)
        self.step_options(name)


@lru_cache(maxsize=8)  # a grid has thousands of experiments with one network
def _check_images(
    network: FrozenConfigDict, shape: tuple[int, ...], label_rows: int | None
) -> None:
    """ValueError unless the network of this section takes images of this shape."""
    with torch.device("meta"):
        args = network.args.to_dict()
        channels = shape[0]
        built = build_network(
            network.name, args, shape, trunk_channels=channels, num_classes=label_rows
        ).eval()
        labels = {} if label_rows is None else {"y": torch.zeros(2, dtype=torch.int64)}
    try:
        built(torch.zeros(2, *shape, device="meta"), torch.zeros(2, device="meta"), **labels)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"network.args must fit images of (C, H, W) = {shape}: {str(error).splitlines()[0]}"
        ) from error


def load_dataset(data: FrozenConfigDict, **options: Any) -> ImageDataset:
    """The images that the section ``data`` names; ``options``: the dataset's, such as a split."""
    if data.split:
        options.setdefault("split", data.split)
    options |= {key: data[key] for key, usual in OF_FOLDERS.items() if data[key] != usual}
    if data.labels and data.name == "folder":  # other data sets have their labels in any case
        options["labels"] = True
    if not data.check_md5:
        options["check_md5"] = False
    return get_dataset(data.name, data.root, **options)


def calls_an_image(sample: FrozenConfigDict, process: str, steps: int) -> int:
    """Network evaluations for one image, by the section ``sample``.

    A derivative counts as one; the last step adds no noise and needs none. Guidance doubles all.
    """
    derivatives = {"probes": sample.probes, "lanczos": sample.lanczos_steps}
    a_step = derivatives.get(get_process(process).variance, 0)
    return (steps + (steps - 1) * a_step) * (2 if sample.guidance else 1)


def _usable_device(name: str) -> torch.device:
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises both
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used: {reason}") from error
