"""The closed form beside measured cells: python -m benchmarks.effect --cells CSV

Takes the cells of a comparison (``cells.csv`` of its reports), by default of the digits. Prints,
for each form of the SA loss, the change of the sample variance from B, predicted and measured.
``--out`` draws the sample variance and the distance in pixels over the steps. The prediction takes
the data's mean and variances alone and a sampler that does not clip.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from adapters.comparison.grid import Grid, Line
from adapters.comparison.store import Store
from adapters.experiment.tables import table
from adapters.hosts import PROCESSES
from benchmarks.cells import Cells, read_cells
from configs import digits_effect_tables
from sa_plugin.effect.chains import best_strength, chain_variances, predicted_frechet
from sa_plugin.effect.gains import exact_gains, gaussian_gains, inflated_gains, strength
from sa_plugin.sampling.trajectory import choose_timesteps
from sa_plugin.schedule import FloatArray

STEPS = (5, 10, 25, 50)
VARIANCE, DISTANCE = "sample_variance", "frechet_pixels"
# Lines of the figure: of the cells, and how the closed form makes them: q, "best" or a training.
SHOWN: dict[str, tuple[str, float | str | None]] = {
    "B": ("b", 0.0),
    "SA-2, trained": ("sa", "sa"),
    "B shifted, q 1/3 (predicted: as SA-2)": ("b/shifted", None),
    "B shifted, best q": ("b/shifted_best", "best"),
}


class Closed:
    """What the closed form says of a comparison's data, digits by default."""

    def __init__(self, config: ConfigDict | None = None) -> None:
        self.grid = Grid(FrozenConfigDict(config or digits_effect_tables.get_config()))
        self.store = Store(self.grid, Path(), "cpu", False)
        plain = self.store.experiment(Line("b"), 0, None)
        variances = self.store.spectrum(plain.config.data).variances
        self.s = variances[variances > 0]
        self.schedule = plain.schedule

    @cached_property
    def exact(self) -> FloatArray:
        """The gains of the baseline."""
        return exact_gains(self.schedule, self.s)

    def gains(self, how: float | str, process: str, steps: int) -> FloatArray:
        """Of a strength q, of the "best" one for the cell, or of a training of the grid."""
        if how == "best":
            row = PROCESSES[process]
            how = best_strength(
                self.schedule, self.s, steps=steps, forward=row.forward, variance=row.variance
            )
        if isinstance(how, str):
            return gaussian_gains(self.loss(how), self.s)
        return inflated_gains(self.schedule, self.s, how) if how else self.exact

    def loss(self, training: str) -> Any:
        """A training's SA loss."""
        return self.store.experiment(Line(training), 0, None).loss

    def cell(self, how: float | str, process: str, steps: int) -> dict[str, float]:
        """Sample variance and distance."""
        row = PROCESSES[process]
        visited = choose_timesteps(self.schedule.N, steps, "linear")
        ends = chain_variances(
            self.schedule,
            self.gains(how, process, steps),
            visited,
            forward=row.forward,
            variance=row.variance,
        )
        return {VARIANCE: float(ends.sum()), DISTANCE: predicted_frechet(ends, self.s)}


def mean(cells: Cells, line: str, process: str, steps: int, metric: str) -> float | None:
    """Over the seeds; None without cells."""
    found = cells.get((line, process, steps))
    return fmean(one[metric] for one in found.values()) if found else None


def change(cells: Cells, line: str, base: str, process: str, steps: int) -> float | None:
    """Of the sample variance from ``base``, paired by seed."""
    ours, theirs = (cells.get((name, process, steps), {}) for name in (line, base))
    both = [ours[seed][VARIANCE] - theirs[seed][VARIANCE] for seed in ours.keys() & theirs]
    return fmean(both) if both else None


def forms(closed: Closed, cells: Cells, processes: Sequence[str]) -> Iterator[list[str]]:
    """A row for each training with the SA loss: the change of the variance by process and steps."""
    there = dict.fromkeys(line for line, _, _ in cells if "/" not in line)
    for training in there:
        loss = closed.loss(training)
        if not loss.lam:
            continue
        row = [closed.grid.title(Line(training)), f"{strength(loss.K, loss.lam):.3f}"]
        for process in processes:
            for steps in STEPS:
                b, sa = (closed.cell(how, process, steps)[VARIANCE] for how in (0.0, training))
                found = change(cells, training, "b", process, steps)
                row.append(f"{sa - b:.2f} / " + ("-" if found is None else f"{found:.2f}"))
        yield row


def draw(closed: Closed, cells: Cells, processes: Sequence[str], path: Path) -> None:
    """Rows: variance and distance; columns: processes; lines predicted, points measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    names = {VARIANCE: "variance of the samples", DISTANCE: "Fréchet distance in pixels"}
    axes = figure.subplots(len(names), len(processes), sharex=True, sharey="row", squeeze=False)
    for (metric, label), row in zip(names.items(), axes, strict=True):
        for process, ax in zip(processes, row, strict=True):
            for colour, (title, (line, how)) in enumerate(SHOWN.items()):
                if how is not None:
                    predicted = [closed.cell(how, process, s)[metric] for s in STEPS]
                    ax.plot(STEPS, predicted, "--", color=f"C{colour}")
                measured = [mean(cells, line, process, s, metric) for s in STEPS]
                ax.plot(STEPS, measured, "o-", color=f"C{colour}", label=title, lw=0.8)
            ax.set(xscale="log", xticks=STEPS, xticklabels=map(str, STEPS))
            ax.minorticks_off()
            if metric == VARIANCE:
                ax.axhline(closed.s.sum(), color="0.5", lw=0.8)
                ax.set_title(PROCESSES[process].title)
            else:
                ax.set(yscale="log", xlabel="steps")
        row[0].set_ylabel(label)
    axes[0, 0].plot([], [], "k--", label="predicted")
    axes[0, 0].plot([], [], color="0.5", lw=0.8, label="the data")
    axes[0, 0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=Path, nargs="+", required=True)
    parser.add_argument("--comparison", default="digits_effect_tables", help="of configs/")
    parser.add_argument("--out", type=Path, help="the picture")
    args = parser.parse_args(argv)
    closed, cells, processes = (
        Closed(import_module(f"configs.{args.comparison}").get_config()),
        read_cells(args.cells, (VARIANCE, DISTANCE)),
        ("ddpm_small", "ddim"),
    )
    head = ["training", "q", *(f"{PROCESSES[p].title}, {s}" for p in processes for s in STEPS)]
    print("Change of the sample variance from B, predicted / measured:\n")
    print(table(head, list(forms(closed, cells, processes)), left=1))
    if args.out is not None:
        draw(closed, cells, processes, args.out)
        print(args.out)


if __name__ == "__main__":
    main()
