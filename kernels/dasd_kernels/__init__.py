"""Kernels for training on packed documents; depends on torch and triton only, usable with any trainer.

Each family is one module; the public functions are exported here.
"""
