"""From images to numbers: where images come from, their features, the metrics of both.

In order of reading: ``evaluation``, ``features``, ``extractor``, ``classifiers``, ``inception``,
``image_sources``, ``metric_names``, ``statistics``.
"""
