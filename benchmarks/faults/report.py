"""The campaign's table: kind of fault x job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The outcome of one fault.

    Attributes:
        in_time: whether the fault came before the command had ended.
        equal: after the continuation the results equal those of an undisturbed run byte for byte.
        refusals: number of commands that correctly refused to work in the folder.
        ended: the longest wait for a command's end, s.
        complaints: wrong exit codes, wrong output, hanging commands.
    """

    kind: str
    job: str
    in_time: bool
    equal: bool
    refusals: int
    ended: float
    complaints: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost and no command was wrong."""
        return self.equal and not self.complaints

    def line(self) -> str:
        """One line for the log."""
        state = "equal" if self.equal else "lost"
        words = [state if self.in_time else "too late", f"{self.ended:.1f} s", *self.complaints]
        return f"{self.kind}, {self.job}: {'; '.join(words)}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row for each kind and job, and one for all."""
    pairs = sorted({(o.kind, o.job) for o in outcomes if o.in_time})
    rows = [
        "| fault | job | runs | equal | lost | refusals | otherwise wrong |",
        "|---|---|" + "--:|" * 5,
    ]
    for kind, job in pairs:
        rows.append(_row(kind, job, [o for o in outcomes if (o.kind, o.job) == (kind, job)]))
    return "\n".join([*rows, _row("**all**", "", outcomes)])


def _row(kind: str, job: str, outcomes: Sequence[Outcome]) -> str:
    there = [o for o in outcomes if o.in_time]
    equal = sum(o.equal for o in there)
    refusals, wrong = sum(o.refusals for o in there), sum(bool(o.complaints) for o in there)
    figures = (len(there), equal, len(there) - equal, refusals, wrong)
    return f"| {kind} | {job} | {' | '.join(map(str, figures))} |"
