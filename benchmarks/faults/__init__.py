"""Causes faults in real commands and checks that each run is continued to the same bytes.

python -m benchmarks.faults --runs 200 --seed 0

jobs.py     the commands, on the smallest networks, and the results that are compared
launch.py   a command as processes forked from this one, which has all imports
kinds.py    the faults
report.py   the table in docs/reliability.md
"""
