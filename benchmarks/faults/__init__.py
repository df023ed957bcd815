"""Faults put into real commands, and whether what they leave is continued to the same bytes.

python -m benchmarks.faults --runs 200 --seed 0

jobs.py     the commands, on the smallest networks, and what of their results is compared
launch.py   a command as processes forked from this one, which has everything imported
kinds.py    the faults
report.py   the table in docs/reliability.md
"""
