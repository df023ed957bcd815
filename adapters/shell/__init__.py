"""What every command does around its work: options, exit codes, configuration files, locks.

In order of reading: ``command``, ``options``, ``config_file``, ``signals``, ``locks``,
``processes``.
"""
