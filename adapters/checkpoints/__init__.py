"""Checkpoints as the original codes publish them: read as data only, checked, converted.

In order of reading: ``fitting``, ``layouts``, ``diffusers_folders``, ``architecture``, ``files``.
"""
