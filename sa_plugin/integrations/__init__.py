"""The SA loss and the optimal reverse variances for use with other libraries.

Each module needs its library. Nothing else in sa_plugin imports these modules.
"""
