"""Joins the plugin (sa_plugin) to the hosts (third_party): experiments, run from the command line.

python -m adapters.sn_dpm --config configs/digits_sn_sa.py
"""
