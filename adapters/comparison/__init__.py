"""Comparisons: a grid of trainings and cells, each computed once, and the report made of them.

grid.py        what a configuration asks for, and what decides each part of it
tasks.py       how each part is made and where it lies
workers.py     tasks by any number of processes and machines
statistics.py  means, deviations and paired intervals over seeds
report.py      tables from cells: Markdown, CSV, LaTeX
page.py        the same as one HTML file
"""
