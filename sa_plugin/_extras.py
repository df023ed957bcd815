"""The error for an optional library that is not installed."""

from __future__ import annotations


def explain_absence(error: ModuleNotFoundError, module: str, extra: str) -> ModuleNotFoundError:
    """``error`` in one line that names the extra; unchanged if another module is missing."""
    if error.name != module:
        return error
    return ModuleNotFoundError(
        f"{module} is not installed; get it by: pip install 'sa-plugin[{extra}]'", name=module
    )
