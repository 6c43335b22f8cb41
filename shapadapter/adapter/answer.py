"""From what players contribute to what a wrapped model returns: prediction and attributions that add up."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from shapadapter.errors import ShapleyError
from shapadapter.objective import project_on_efficiency
from shapadapter.outputs import MatchingOutput, ShapleyOutput

from .coalitions import CoalitionGame
from .texts import similarity


def answer(game: CoalitionGame, contributions: Tensor, output: Any, travelled: bool) -> ShapleyOutput:
    """The output of one call.

    Args:
        game: the call's game.
        contributions: (B, N, K) what the head says each player adds, before efficiency.
        output: the base model's own.
        travelled: whether a token went through the blocks with the image.

    Raises:
        ShapleyError: coalitions were given to a matching model, but no texts to compare them with.
    """
    matching = game.anatomy.kind == "matching"
    own = getattr(output, "image_embeds" if matching else game.anatomy.family.scores, None)
    full, attributions, null = _efficient(game, contributions, own)
    values = game.coalition_values()
    states = {
        "hidden_states": game.call.base_states(getattr(output, "hidden_states", None), travelled),
        "attentions": getattr(output, "attentions", None),
    }
    if matching:
        return _matched(game, full, attributions, null, values, output)
    labels = game.call.labels
    loss = None if labels is None else task_loss(game.model, labels, full)
    return ShapleyOutput(loss, full, attributions, null, values, **states)


def _efficient(game: CoalitionGame, contributions: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """v(all) (B, K), attributions (B, N, K) and v(empty) (B, K), of which the second make the difference."""
    if game.rules.prediction == "vote":
        assert game.null is not None
        null = game.null.float().expand(contributions.shape[0], -1)  # (B, K)
        total = contributions.sum(dim=1)  # (B, K)
        return null + total, _in_the_plane(contributions, total), null
    assert own is not None
    null = game.empty_value().expand(own.shape[0], -1)  # (B, K)
    # Attributions describe the prediction and must not move it: no gradient through the logits here.
    return own, project_on_efficiency(contributions, own.detach().float(), null), null


def _in_the_plane(contributions: Tensor, total: Tensor) -> Tensor:
    """The same numbers (B, N, K), whose gradient leaves their sum `total` (B, K) alone.

    The Shapley value is the minimiser of the Shapley loss among attributions of a given sum. A gradient that moves the
    sum would make the prediction easier to explain instead of explaining it.
    """
    return contributions - ((total - total.detach()) / contributions.shape[1])[:, None]


def task_loss(model: Any, labels: Tensor, logits: Tensor) -> Tensor:
    """The base model's loss on logits (B, K): by its problem type cross-entropy, binary cross-entropy or squares."""
    if logits.shape[-1] == 1 or model.config.problem_type in ("regression", "multi_label_classification"):
        labels = labels.to(logits.dtype)  # whole numbers, too, are targets
    # A model without a head would answer with the loss of language models.
    if getattr(model, "loss_type", None) == "ForImageClassification" or hasattr(model, "_loss_function"):
        return model.loss_function(labels, logits, model.config)
    return ForSequenceClassificationLoss(labels, logits, model.config)


def _matched(
    game: CoalitionGame, full: Tensor, attributions: Tensor, null: Tensor, values: Tensor | None, output: Any
) -> MatchingOutput:
    """Everything in the space of embeddings, seen along the texts where there are any."""
    texts, model = game.call.texts, game.model
    assert texts is not None
    spaces: dict[str, Any] = {"image_embeds": full, "embedding_attributions": attributions, "null_embeds": null}
    if not texts.given:
        if values is not None:
            raise ShapleyError("Coalitions were given without texts; their values are similarities to texts.")
        return MatchingOutput(**spaces)
    directions = output.text_embeds if texts.embeds is None else texts.embeds  # (T, P)
    logits, empty = similarity(model, full, directions), similarity(model, null, directions)  # (B, T)
    along = similarity(model, attributions, directions, difference=True)  # (B, N, T)
    # The scale, 100 in a trained CLIP, has multiplied the rounding errors; no gradient, for they are none of the head's.
    rounding = (logits - empty - along.sum(dim=1)).detach() / along.shape[1]  # (B, T)
    return MatchingOutput(
        loss=texts.loss_of(model, logits),
        logits=logits,
        attributions=along + rounding[:, None],
        null_values=empty,
        coalition_values=None if values is None else similarity(model, values, directions),  # (B, M, T)
        text_embeds=directions,
        **spaces,
    )
