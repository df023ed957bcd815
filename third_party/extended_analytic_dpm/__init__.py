"""A port of the training code of NPR-DPM and SN-DPM (arXiv 2206.07309); see ../README.md.

One module, one matter:

    schedule        the forward process as float64 tables           (nothing but NumPy and x_0)
    wrapper         the network's habits: time index, rescaling, channel halves
    criterion_base  one optimiser step, whatever the objective
    criterions      the objectives of this host
    methods         the host's method names, and a criterion built from one of them
    ema, checkpoints, random_states, training, data, datasets       common to hosts of this line
    nets            the networks of the published checkpoints
"""
