"""``fpe gpu``: everything that a GPU is needed for, in one command that a cut run does not waste."""
