"""The claim, measured on the machine at hand: its roof, and an expanded layer beside its parent and the wide layer."""
