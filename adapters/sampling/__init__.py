"""From a sampler to files: one stream of uint8 batches, and the sinks that take it.

In order of reading: ``pipeline``, ``sinks``, ``metrics_sink``; ``solvers`` beside.
"""
