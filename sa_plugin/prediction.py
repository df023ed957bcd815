"""The three usual targets of a network, and the conversions between them.

With a = sqrt(cum_alpha_n) and b = sqrt(cum_beta_n), x_n = a x_0 + b eps, and
v = a eps - b x_0 (arXiv 2202.00512, appendix D). The conversions take arrays of any library.
"""

from __future__ import annotations

from sa_plugin._arrays import Numeric

PREDICTS = ("eps", "x0", "v")


def to_eps(output: Numeric, x: Numeric, a: Numeric, b: Numeric, predicts: str) -> Numeric:
    """The noise implied by an output of kind ``predicts``; a, b broadcast over x."""
    if predicts == "eps":
        return output
    if predicts == "x0":
        return (x - a * output) / b
    return b * x + a * output


def to_x0(output: Numeric, x: Numeric, a: Numeric, b: Numeric, predicts: str) -> Numeric:
    """The clean image implied by an output of kind ``predicts``; a, b broadcast over x."""
    if predicts == "x0":
        return output
    if predicts == "eps":
        return (x - b * output) / a
    return a * x - b * output
