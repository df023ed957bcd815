"""The SA term in a host's own objective, without a change of the host.

In order of reading: ``hook`` (attach), ``hosts``, ``interception``; ``wrappers`` (EpsModel).
"""
