"""What every command does around its work: options and exit codes, signals, locks.

In order of reading: ``command``, ``signals``, ``locks``.
"""
