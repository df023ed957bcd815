"""What the SA loss does, in closed form for Gaussian data, and the same effect without training.

In order of reading: ``gains``, ``chains``, ``predicted``, ``spectrum``, ``correction``.
"""
