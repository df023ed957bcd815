"""The one sampler: any forward process, any reverse variance, any trajectory.

In order of reading: ``sampler``, ``reverse``, ``variance``, ``trajectory``, ``gamma``; ``batches``
and ``tally`` serve them.
"""
