"""The PTX that Triton compiles for the kernels, executed in NumPy and checked while it runs.

``parse`` reads a module, ``machine`` holds the state of a launch and runs it, ``memory`` the two memories and what is
known of every byte of them. What an instruction does stands in a table from its full opcode to a function:
``integers``, ``floats``, ``movement`` and ``matrix`` for what all architectures share, ``hopper`` and ``blackwell`` for
the rest.
``harness`` takes the launches of the real launchers, ``cases`` lists them, ``mutate`` breaks them on purpose.
"""
