"""The heart stays short: how many of our functions and files one evaluation passes."""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

import sa_plugin
from sa_plugin import SALoss, attach
from tests.sa_plugin.hooks.test_hook import SCHEDULE, X0
from tests.stand_ins import port
from tests.toys import Toy

ROOT = str(Path(sa_plugin.__file__).parent)


def files_passed(evaluate: Callable[[], object]) -> list[str]:
    """The file of each of our functions that is entered, in order; the second time."""
    evaluate()
    entered = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            entered.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        evaluate()
    finally:
        sys.setprofile(None)
    return entered


def changes(entered: list[str]) -> int:
    """How often the file is another one than before."""
    return sum(a != b for a, b in pairwise(entered))


def test_one_evaluation_of_the_loss():
    loss, n = SALoss(SCHEDULE), torch.arange(1, len(X0) + 1)
    entered = files_passed(lambda: loss(lambda x, n: x, X0, n=n))
    assert 10 < len(entered) <= 40
    assert 5 < changes(entered) <= 12


def test_one_hooked_objective():
    criterion = attach(port("eps", Toy()), SALoss(SCHEDULE))
    entered = files_passed(lambda: criterion.objective(X0))
    assert 20 < len(entered) <= 70
    assert 10 < changes(entered) <= 20
