"""A port of the training code of Analytic-DPM (arXiv 2201.06503); see ../README.md.

Its criterion alone is its own. The schedules, the training loop, checkpoints, data and networks are
common to both hosts and lie in `extended_analytic_dpm`.
"""
