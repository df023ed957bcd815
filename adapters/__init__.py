"""Connect sa_plugin to the hosts in third_party, and run experiments from the command line.

    python -m adapters.sn_dpm --config configs/digits_sn_sa.py

The modules here are the commands, and ``hosts``, the table of what each host can do. The rooms,
each of which uses only those before it: ``shell``, ``checkpoints``, ``measuring``, ``pictures``,
``sampling``, ``experiment``, ``comparison``.
"""

try:
    import absl  # noqa: F401 - every command needs it
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed; get it by: pip install 'sa-plugin[adapters]'",
        name=error.name,
    ) from None
