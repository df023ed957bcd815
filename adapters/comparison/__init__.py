"""Comparisons: a grid of trainings and cells, each computed once, and a report on them.

grid.py        what a configuration asks for, and what determines each part of it
tasks.py       how each part is made and where it is stored
workers.py     running the tasks in any number of processes, on any number of machines
statistics.py  means, deviations and paired intervals over seeds
report.py      the report: Markdown, CSV, LaTeX
page.py        the report as one HTML file
"""
