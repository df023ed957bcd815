"""The code that the ports of these hosts share. No original has such a package; see ../README.md.

schedule        the forward process as float64 tables
wrapper         the network's conventions: step to time, rescaling, channel halves
criterion_base  one optimiser step for any objective, and the optimiser
training        the loop; ema, checkpoints, random_states and window are its parts
data, datasets  images by name, endless batches
nets            the networks of the published checkpoints
"""
