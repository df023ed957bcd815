"""Joins the plugin (sa_plugin) to the hosts (third_party): experiments, run from the command line.

python -m adapters.sn_dpm --config configs/digits_sn_sa.py
"""

from sa_plugin._extras import explain_absence

try:
    import absl  # noqa: F401 - which no command does without
except ModuleNotFoundError as error:
    raise explain_absence(error, "absl", "adapters") from None
