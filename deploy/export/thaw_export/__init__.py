"""Writes a PyTorch model as the `.pt2` graph that Thaw fine-tunes.

The package runs once, on the user's machine; Thaw's workers run no Python. It never reaches for a network, and it reads
weights only from safetensors files, so nothing it is given can run code (a `module:function` source is code by intent).
"""
