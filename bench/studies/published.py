"""The paper's figures that stand beside ours, in percent of test accuracy unless it says otherwise."""

BOOLEAN = {"dense": 78.7, "random": 88.7, "clause": 99.4}
"""The case study of 8 clauses and 8 neurons (section 2.2.1)."""

DEEP = {
    5: {4: 28.0, 8: 2.6, 12: 0.4, 16: 0.2},
    7: {4: 34.0, 8: 11.0, 12: 1.1, 16: 0.8},
    9: {4: 104.0, 8: 8.7, 12: 2.0, 16: 1.4},
}
"""Table A3: relative improvement on CIFAR-100 by layers and width."""

IMAGENET = {6: (13.0, 13.9), 8: (23.8, 25.1), 10: (30.6, 31.9), 12: (38.1, 38.8), 14: (42.9, 43.6), 16: (46.9, 47.0)}
"""Table A4: dense and FPE on ImageNet-1k, five layers, by width."""

TWO_FOUR = {"dense-continued": 53.89, "2:4 magnitude": 61.67, "random magnitude": 61.92}
"""Table A5: CIFAR-100; the width is not given with it."""

REWIRING = {4: 4.5, 8: 1.9, 16: 0.5}
"""Points that moving masks gain over masks that stay, CIFAR-100, by neurons."""

REWIRING_RELATIVE = {4: 53.0, 8: 14.0, 16: 3.0}
"""The same networks over dense ones, in percent of these."""
