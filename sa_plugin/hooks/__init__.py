"""The SA term in a host's own objective, without a change of the host.

In order of reading: ``hook`` (attach), ``hosts``, ``training_losses``, ``interception``; ``sigma``
for codes of EDM's kind; ``wrappers`` (EpsModel).
"""
