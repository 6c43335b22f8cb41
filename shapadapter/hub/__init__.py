"""How a checkpoint meets the world: pushed to the Hub, with a card, and as a Space."""

from .pushing import push

__all__ = ["push"]
