"""Functions for worker processes, which need not import JAX."""

import os


def loss(h):
    return h["x"] ** 2 + (h["kind"] == "b")


def crash(h):
    if h["kind"] == "b":
        os._exit(1)
    return h["x"] ** 2
