"""Experiments as ml_collections files that hold only numbers and strings."""
