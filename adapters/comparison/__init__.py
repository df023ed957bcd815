"""A grid of trainings and cells, each computed once and stored, and a report on them.

In order of reading: ``grid`` (what is asked for), ``plan``, ``tasks``, ``store``, ``engine``,
``cost``; the report: ``report``, ``tables``, ``figures``, ``page``.
"""
