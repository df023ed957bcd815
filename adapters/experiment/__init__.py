"""An experiment: a configuration, a folder, and the stages base, head or gamma, sample, evaluate.

In order of reading: ``run``, ``experiment``, ``stages``, ``gamma_stage``, ``config``, ``logs``,
``tables``.
"""
