"""A port of the training code of Analytic-DPM (arXiv 2201.06503); see ../README.md."""
