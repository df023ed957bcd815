"""Experiments as ml_collections files: numbers and strings only."""
