"""The model card: facts in, `README.md` out. It knows no model."""

from shapadapter.hub.card.facts import Facts, read_config, settled, weights_digest, write_record
from shapadapter.hub.card.metadata import is_ours
from shapadapter.hub.card.pull import card_for_push, has_adapter
from shapadapter.hub.card.render import (
    CARD,
    PICTURES,
    card_metadata,
    read_card,
    read_pictures,
    untouched,
    updated,
    write_card,
)
from shapadapter.hub.card.results import compact

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
