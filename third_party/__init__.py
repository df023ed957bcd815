"""Ports of host training codes. Knows nothing of ``sa_plugin``; see README.md in this folder."""
