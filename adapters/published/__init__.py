"""Checkpoints as the original codes publish them: read as data only, checked, written.

files          one file -> what it holds, without running anything of it; and safe writing
layouts        what it holds -> state dicts, "ema" and "model"; state dicts -> a layout
architecture   a state dict -> the network it belongs to, and what does not fit a network
"""
