"""Ports of host training codes. They do not import ``sa_plugin``; see README.md in this folder."""
