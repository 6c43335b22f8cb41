"""The model card: facts in, `README.md` out. It knows no model."""

from .facts import Facts
from .pulling import card_for_push, has_adapter
from .record import read_config, settled, weights_digest, write_record
from .results import compact
from .sections import is_ours
from .writing import CARD, PICTURES, card_metadata, read_card, read_pictures, untouched, updated, write_card

__all__ = [
    "CARD",
    "PICTURES",
    "Facts",
    "card_for_push",
    "card_metadata",
    "compact",
    "has_adapter",
    "is_ours",
    "read_card",
    "read_config",
    "read_pictures",
    "settled",
    "untouched",
    "updated",
    "weights_digest",
    "write_card",
    "write_record",
]
