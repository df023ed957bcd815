"""Connect sa_plugin to the hosts in third_party, and run experiments from the command line.

python -m adapters.sn_dpm --config configs/digits_sn_sa.py
"""

from sa_plugin._extras import explain_absence

try:
    import absl  # noqa: F401 - every command needs it
except ModuleNotFoundError as error:
    raise explain_absence(error, "absl", "adapters") from None
