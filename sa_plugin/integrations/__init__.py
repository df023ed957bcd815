"""The SA loss and the optimal reverse variances in the terms of other libraries.

Each needs its library, and nothing else in sa_plugin imports it.
"""
