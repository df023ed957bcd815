"""What the ports of this line of hosts share; it has no original of its own; see ../README.md.

One module, one matter:

    schedule        the forward process as float64 tables           (nothing but NumPy and x_0)
    wrapper         the network's habits: time index, rescaling, channel halves
    criterion_base  one optimiser step, whatever the objective, and the optimiser
    training        the loop; ema, checkpoints, random_states and window are its parts
    data, datasets  images by name, endless batches
    nets            the networks of the published checkpoints
"""
