"""What a wrapped model returns: prediction, attributions, the values of coalitions and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers.utils.generic import ModelOutput

from shapadapter.adapter.call import ModelCall
from shapadapter.adapter.coalitions import CoalitionGame
from shapadapter.adapter.head import Evidence
from shapadapter.core.errors import ShapleyError
from shapadapter.core.shapley import expected_square, project_on_efficiency
from shapadapter.data.labels import PROBLEMS, LabelRules, known_labels


@dataclass
class ShapleyOutput(ModelOutput):
    """Prediction and explanation of one forward pass: `null_values + attributions.sum(1)` equals `logits`.

    Attributes:
        loss: the task loss, if labels were given.
        logits: (B, K), the prediction, with its usual meaning.
        attributions: (B, N, K) fp32, what each player adds to each class's logit; players in raster order.
        null_values: (B, K) fp32, the logits with no player present.
        coalition_values: (B, M, K) fp32, the logits of each coalition, if coalitions were given.
        coalition_attributions: (B, M, K) fp32, the sum of the attributions of the players present, in place of
            `attributions`, if coalitions were given with `return_attributions=False`: all a training step needs.
        expected_square: (B,) fp32 without gradient, `objective.expected_square` of the attributions; likewise.
        hidden_states: the base model's, if asked for; without the Shapley token.
        attentions: the base model's, if asked for; without the Shapley token.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    attributions: Tensor | None = None
    null_values: Tensor | None = None
    coalition_values: Tensor | None = None
    coalition_attributions: Tensor | None = None
    expected_square: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MatchingOutput(ShapleyOutput):
    """The same for images and texts: the K classes are the T texts, the logits their similarities before softmax.

    The game is played in the space of embeddings, in which a text is a direction: for the normalised embedding t (P,)
    of any text, `scale * embedding_attributions @ t` are its attributions, with the model's `scale`. Without texts,
    `logits`, `attributions`, `null_values` and `coalition_values` are None. `hidden_states` and `attentions`, of which the
    base model has those of two towers, are always None.

    Attributes:
        image_embeds: (B, P), with `classifier` prediction the model's own, normalised.
        text_embeds: (T, P), normalised.
        embedding_attributions: (B, N, P) fp32, what each player adds to the image's embedding.
        null_embeds: (B, P) fp32, the embedding with no player present.
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    embedding_attributions: Tensor | None = None
    null_embeds: Tensor | None = None

    @property
    def logits_per_image(self) -> Tensor | None:
        """(B, T), as the base model calls the logits."""
        return self.logits

    @property
    def logits_per_text(self) -> Tensor | None:
        """(T, B)."""
        return None if self.logits is None else self.logits.t()


def answer(
    game: CoalitionGame, evidence: Evidence, output: Any, token_in_sequence: bool, weights: Tensor | None
) -> ShapleyOutput:
    """The output of one call, from the base model's `output` and what the head has read off the cells.

    `weights` (B, cells) say how much of each cell is present, all of it if None.
    """
    matching = game.anatomy.kind == "matching"
    if game.rules.prediction == "vote":
        assert game.null is not None
        total = evidence.total(weights)  # (B, K)
        null = game.null.float().expand(total.shape[0], -1)  # (B, K)
        full = null + total  # (B, K)
    else:
        full = getattr(output, "image_embeds" if matching else game.anatomy.family.scores)  # (B, K)
        null = game.empty_value().expand(full.shape[0], -1)  # (1, K) -> (B, K)
    values = game.coalition_values()  # (B, M, K)
    if matching:
        return _match(game, evidence, full, null, values, output)
    call = game.call
    states = getattr(output, "hidden_states", None)
    if states is not None and token_in_sequence:  # it stands at index 0 inside the blocks
        cells = call.tiling.cells[0] * call.tiling.cells[1]
        tokens = game.anatomy.prefix + cells if call.pixel_values.ndim == 4 else call.pixel_values.shape[1]
        states = tuple(s[:, 1:] if s.ndim == 3 and s.shape[1] == tokens + 1 else s for s in states)  # (B, T, D)
    return ShapleyOutput(
        loss=None if call.labels is None else task_loss(game.model, call.labels, full),
        logits=full,
        null_values=null,
        coalition_values=values,
        **_attribute(call, evidence, full, null),
        hidden_states=states,
        attentions=getattr(output, "attentions", None),
    )


def task_loss(model: Any, labels: Tensor, logits: Tensor) -> Tensor:
    """The base model's loss on logits (B, K), in fp32: by its problem type cross-entropy, binary cross-entropy or squares.

    It is the mean over the labels that are known, each of several counting for itself; 0 where none is. A label that is
    no class of the model is refused.
    """
    config, logits = model.config, logits.to(torch.promote_types(logits.dtype, torch.float32))
    if "_loss_function" in vars(model):  # the user's own
        return model.loss_function(labels, logits, config)
    labels = labels.to(logits.device)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # (B, 1) -> (B,)
    rules = LabelRules(logits.shape[-1], config.problem_type)
    kind = rules.kind(several=labels.ndim > 1)
    if config.problem_type is None:  # what the probabilities are is read off it, too
        config.problem_type = PROBLEMS[kind]
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # reading them would halt a GPU
        rules.check_batch(labels)
    known = known_labels(labels, kind == "quantity")  # (B,) or (B, K)
    if kind == "class":
        losses = cross_entropy(logits, labels.where(known, 0).long(), reduction="none")  # (B,)
    else:
        known = known.view_as(logits)  # (B,) or (B, K) -> (B, K)
        wanted = labels.to(logits.dtype).view_as(logits).where(known, 0)  # (B, K)
        measure = mse_loss if kind == "quantity" else binary_cross_entropy_with_logits
        losses = measure(logits, wanted, reduction="none")  # (B, K)
    # `where`, for a label that is not known may go with a logit that is not finite.
    return losses.where(known, 0).sum() / known.sum().clamp(min=1)


def _attribute(
    call: ModelCall,
    evidence: Evidence,
    full: Tensor,
    null: Tensor,
    to_classes: Callable[[Tensor], Tensor] = Tensor.float,
) -> dict[str, Any]:
    """The attributions, which share out `full` - `null`, (B, K) each, by the names of the output's fields.

    They are what a player's cells contribute, moved to the efficiency plane (`project_on_efficiency`). The gradient
    stays in that plane: the Shapley value is the minimiser of the Shapley loss among attributions of a given sum, and a
    gradient that moved the sum would make the prediction easier to explain instead of explaining it. `to_classes` is the
    linear map from contributions (..., P) to classes (..., K), where these are not the same.
    """
    full, null = full.detach().float(), null.detach()

    def attributions() -> Tensor:
        """Every player's share, (B, N, K)."""
        raw = call.tiling.attributions(evidence.contributions())  # (B, cells, P) -> (B, N, P)
        return project_on_efficiency(to_classes(raw), full, null)  # (B, N, K)

    if call.coalitions is None or call.return_attributions:
        return {"attributions": attributions()}
    missing = full - null - to_classes(evidence.total())  # (B, P) -> (B, K)
    present = call.coalitions.float().mean(dim=2, keepdim=True)  # (B, M, N) -> (B, M, 1), the share of players
    sums = evidence.sums(call.tiling.cell_weights(call.coalitions))  # (B, M, cells) -> (B, M, P)
    with torch.no_grad():
        square = expected_square(attributions())  # (B,)
    return {"coalition_attributions": to_classes(sums) + present * missing[:, None], "expected_square": square}


def _match(
    game: CoalitionGame, evidence: Evidence, full: Tensor, null: Tensor, values: Tensor | None, output: Any
) -> MatchingOutput:
    """The output in the space of embeddings and, where there are texts, along them."""
    call, texts, model = game.call, game.call.texts, game.model
    assert texts is not None
    embeds: dict[str, Any] = {"image_embeds": full, "null_embeds": null}
    if call.return_attributions:
        embeds["embedding_attributions"] = _attribute(call, evidence, full, null)["attributions"]  # (B, N, P)
    if not texts.given:
        if values is not None:
            raise ShapleyError("Coalitions were given without texts; their values are similarities to texts.")
        return MatchingOutput(**embeds)
    directions = output.text_embeds if texts.embeds is None else texts.embeds  # (T, P)
    logits, empty = similarity(model, full, directions), similarity(model, null, directions)  # (B, T)

    def to_classes(part: Tensor) -> Tensor:
        """Differences of embeddings (..., P) along the texts, (..., T)."""
        return similarity(model, part, directions, difference=True)

    if call.return_attributions:
        along = to_classes(embeds["embedding_attributions"])  # (B, N, T)
        # Once more: the scale, 100 in a trained CLIP, has multiplied the rounding errors.
        attributed: dict[str, Any] = {"attributions": project_on_efficiency(along, logits.detach(), empty.detach())}
    else:
        attributed = _attribute(call, evidence, logits, empty, to_classes)
    return MatchingOutput(
        loss=texts.loss_of(model, logits),
        logits=logits,
        null_values=empty,
        coalition_values=None if values is None else similarity(model, values, directions),  # (B, M, T)
        text_embeds=directions,
        **attributed,
        **embeds,
    )


def similarity(model: Any, embeds: Tensor, text_embeds: Tensor, difference: bool = False) -> Tensor:
    """Similarity before softmax of embeddings (..., P) and normalised texts (T, P): (..., T) fp32.

    With `difference`, `embeds` are differences of embeddings, for which the model's bias cancels out.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        scaled = embeds.float() @ text_embeds.float().t() * model.logit_scale.float().exp()
    bias = getattr(model, "logit_bias", None)
    return scaled if difference or bias is None else scaled + bias.float()
