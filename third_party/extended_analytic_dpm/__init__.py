"""A port of the training code of NPR-DPM and SN-DPM (arXiv 2206.07309); see ../README.md.

criterions  the objectives of this host
methods     the host's method names, and a criterion built from one of them
"""
