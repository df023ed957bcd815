"""What the tests of commands share: their words, and the one line of a refusal."""

from adapters.experiment.config import flatten

QUIET = ["--device=cpu", "--noprogress"]


def words(file, **sections):
    """``--config=configs/FILE`` with keys of its sections changed, on the CPU, without baseline."""
    if file.endswith("_sn_sa.py"):
        sections = {"baseline": False, **sections}
    changed = (f"--config.{key}={value}" for key, value in flatten(sections).items())
    return [f"--config=configs/{file}", *changed, *QUIET]


def one_line(capsys, *parts):
    """What was said on standard error: one line, with these parts."""
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert said.endswith("\n")
    for part in parts:
        assert str(part) in said
    return said
