"""Checkpoints as the original codes publish them: read as data only, checked, written.

files          read the content of a file without running any code in it; write a file safely
layouts        from a file's content to the state dicts "ema" and "model", and back to a layout
architecture   find the network of a state dict; report what does not fit a network
"""
