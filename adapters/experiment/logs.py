"""Training logs: a CSV file and TensorBoard events; a continued run continues both."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from sa_files.reading import UnreadableFile, reading
from sa_files.writing import write_atomically

CSV_FILE = "log.csv"
# What is read of a log. A training that writes more becomes slow: each row writes the file anew.
LONGEST_ROW = 2**16  # characters
MOST_NUMBERS = 2**20


class TrainingLog:
    """Rows of (iteration, statistics) in ``folder``/log.csv and ``folder``/tensorboard.

    A run that continues from a checkpoint reports the iterations after it again. The new rows
    replace the old ones.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / CSV_FILE
        self._rows: list[dict[str, str]] | None = None
        self._board = None

    def __call__(self, iteration: int, means: dict[str, float]) -> None:
        """Add the means of the statistics since the last call."""
        if self._rows is None:
            self._open(iteration)
        self._rows.append(
            {"iteration": str(iteration)} | {name: f"{mean:.8g}" for name, mean in means.items()}
        )
        self._write()
        for name, mean in means.items():
            self._board.add_scalar(name, mean, iteration)

    def close(self) -> None:
        """Finish the TensorBoard file."""
        if self._board is not None:
            self._board.close()

    def _open(self, iteration: int) -> None:
        # Takes half a second to import, and only training needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._rows = [row for row in read_rows(self._path) if int(row["iteration"]) < iteration]
        self._board = SummaryWriter(self._folder / "tensorboard", purge_step=iteration)

    def _write(self) -> None:
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self._path, text.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log; an empty list where there is no file."""
    if not path.exists():
        return []
    with reading(path, "is damaged: remove it, and it is written again") as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        rows: list[dict[str, str]] = []
        # A longer line becomes several rows, whose columns differ from the header's.
        for row in csv.DictReader(iter(lambda: text.readline(LONGEST_ROW), "")):
            int(row["iteration"])
            if None in row or None in row.values():
                raise UnreadableFile(f"the columns of a row differ from the header: {row}")
            rows.append(row)
            if len(rows) * len(row) > MOST_NUMBERS:
                raise UnreadableFile(f"it has more than {MOST_NUMBERS} numbers")
        return rows
