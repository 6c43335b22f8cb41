"""How a checkpoint meets the world: pushed to the Hub, with a card, and as a Space."""

from .cards import update_card
from .pushing import push

__all__ = ["push", "update_card"]
