"""The commands, one file for each."""

import os

# JAX reads it when it starts; by default it would leave a quarter of a GPU's memory unused.
if not os.environ.keys() & {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}:
    os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.92"
