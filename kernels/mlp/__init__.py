"""A whole expanded MLP in one launch: for layers so small that launches cost more than their arithmetic."""

from .api import expanded_mlp
from .eager import expanded_mlp_eager

__all__ = ["expanded_mlp", "expanded_mlp_eager"]
