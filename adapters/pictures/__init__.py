"""Pictures as PNG files: grids of samples and plots of metrics, chains, gaps.

In order of reading: ``pictures``, ``strips``, ``gap_pictures``.
"""
