"""The names of what a split may look like; what each means stands in :class:`fpe.Partition`."""

RANDOM = "random"
TWO_FOUR = "2:4"
BLOCK = "block"
STRUCTURES = (RANDOM, TWO_FOUR, BLOCK)
