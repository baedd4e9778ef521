"""The task loss of preferences: from a micro-batch's hidden states to its loss, its gradient, and what is measured of it.

An objective (lopt_edge/objectives) gives the loss L of whole sequences' log-probabilities s_b = -sum of the cross-entropies
of b's tokens, and the slopes dL / ds_b. A token is of one sequence only, so with h_t its hidden state

    dL / dh_t = -(dL / ds_b) * d cross-entropy_t / dh_t

and one pass over the vocabulary does: each tile of tokens gives its cross-entropies and their gradients, as for the task
loss; once all are there, each sequence's rows are multiplied by its slope. Exact, and nothing of tokens x vocabulary lives
longer than a chunk. Beside the task loss it keeps one fp32 number for each supervised token.

The rule: what is summed over micro-batches is a sum by definition (`MEASURED`), so that accumulation, a step that is left
and taken up again, and the one big batch come to the same. Shapes: B sequences, T tokens, N supervised tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lopt_edge.objectives import Objective
from lopt_edge.objectives.objective import Judged, Scored
from lopt_edge.objectives.objective import Window as ChoiceTotals
from lopt_edge.run.device import sum_dtype
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.batches import Batch, Choices, Totals
from lopt_edge.run.step.losses import task_loss
from lopt_edge.run.step.step_state import FIRST_MEASURED, SegmentGradient, present

SHOWN = ("rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy", "logps_chosen", "logps_rejected")
MEASURED = ("rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected", "n_chosen", "n_rejected", "n_right")


def choice_gradient(
    model: Model,
    objective: Objective,
    hidden_BTD: Tensor,
    batch: Batch,
    totals: Totals,
    *,
    tile: int,
    loss_scale: float,
) -> SegmentGradient:
    """The gradient of a micro-batch's part of the objective times `loss_scale`, its loss, and what is measured of it.

    The formula is the host's, so a GPU's host waits for the sums once a micro-batch.
    """
    flat_ND, share = hidden_BTD.flatten(0, 1), 1.0 / max(1, totals.supervised)
    grad_ND = torch.zeros_like(flat_ND)
    losses_N = torch.empty(batch.n_supervised, dtype=torch.float32, device=flat_ND.device)
    for start in range(0, batch.n_supervised, tile):
        part = slice(start, start + tile)
        tile_N = batch.supervised_N[part]
        grad_ND[tile_N] = _tile(
            model,
            flat_ND[tile_N],
            batch.targets_N[part],
            scale=loss_scale * share,
            each_N=losses_N[part],
            host_targets_N=batch.host_targets(part),
        )
    choices = present(batch.choices)
    scored = scored_sequences(choices, sequence_sums(losses_N, choices.n_targets))
    judged = objective.judged(scored, present(totals.window))
    loss = torch.tensor(judged.loss, dtype=sum_dtype(flat_ND.device), device=flat_ND.device)
    for place, slope in zip(batch.places, judged.slopes, strict=True):
        grad_ND[place].mul_(-slope / share)
    return SegmentGradient(grad_ND.view_as(hidden_BTD), loss, measured(scored, judged, choices.together))


def _tile(
    model: Model,
    leaf_ND: Tensor,
    targets_N: Tensor,
    *,
    scale: float,
    each_N: Tensor,
    host_targets_N: Tensor | None,
) -> Tensor:
    """The gradient (N, D) of a tile's summed cross-entropy times `scale`, which is the task loss', so that half precision
    holds it; `each_N` takes the tokens' cross-entropies."""
    leaf_ND.requires_grad_()
    with torch.enable_grad():
        loss = task_loss(model, leaf_ND, targets_N, each_N=each_N, host_targets_N=host_targets_N)
        torch.autograd.backward(loss * scale)
    return present(leaf_ND.grad)


def sequence_sums(losses_N: Tensor, n_targets: Sequence[int]) -> list[float]:
    """The log-probability of each sequence: minus the sum of its tokens' cross-entropies, in float64 where the device has
    it, read once."""
    parts = [part.sum(dtype=sum_dtype(losses_N.device)) for part in torch.split(losses_N, list(n_targets))]
    return [-value for value in torch.stack(parts).tolist()]


def scored_sequences(choices: Choices, log_probs: Sequence[float]) -> tuple[Scored, ...]:
    """The sequences of a micro-batch as an objective sees them."""
    reference = choices.reference or (0.0,) * len(log_probs)
    rows = zip(log_probs, choices.n_targets, choices.preferred, reference, strict=True)
    return tuple(Scored(*row) for row in rows)


def measured(scored: Sequence[Scored], judged: Judged, together: int) -> dict[str, float]:
    """The sums by the names of `MEASURED`; `n_right` are the pairs whose chosen reply has the larger reward."""
    found = dict.fromkeys(MEASURED, 0.0)
    for one, reward in zip(scored, judged.rewards, strict=True):
        which = "chosen" if one.preferred else "rejected"
        found[f"rewards_{which}"] += reward
        found[f"logps_{which}"] += one.log_prob
        found[f"n_{which}"] += 1
    if together == 2:
        found["n_right"] = float(sum(a > b for a, b in zip(judged.rewards[::2], judged.rewards[1::2], strict=True)))
    return found


def means(sums: Mapping[str, float], *, paired: bool) -> dict[str, float]:
    """The means of what was measured, as metrics.jsonl has them; of labelled rows those of a label that came.

    The names are those of TRL with an underscore: rewards of chosen (desirable) and rejected replies, their margin, the
    share of pairs whose chosen reply has the larger reward, and the summed log-probabilities.
    """
    found = {
        f"{what}_{which}": sums[f"{what}_{which}"] / sums[f"n_{which}"]
        for what in ("rewards", "logps")
        for which in ("chosen", "rejected")
        if sums[f"n_{which}"]
    }
    if "rewards_chosen" in found and "rewards_rejected" in found:
        found["rewards_margin"] = found["rewards_chosen"] - found["rewards_rejected"]
    if paired and sums["n_chosen"]:
        found["rewards_accuracy"] = sums["n_right"] / sums["n_chosen"]
    return found


def add_measured(losses: dict[int, float], sums: Mapping[str, float]) -> None:
    """Add a micro-batch's sums to what a step has come to so far, beside its losses."""
    for place, value in enumerate(sums.values()):
        losses[FIRST_MEASURED - place] = losses.get(FIRST_MEASURED - place, 0.0) + value


def measured_means(losses: Mapping[int, float], objective: Objective | None) -> dict[str, float]:
    """The means of what a step's micro-batches added; none where replies are learned."""
    if objective is None:
        return {}
    sums = {name: losses[FIRST_MEASURED - place] for place, name in enumerate(MEASURED)}
    return means(sums, paired=objective.paired)


@torch.no_grad()
def log_probs(
    model: Model, batch: Batch, n_targets: Sequence[int], *, token_tile: int, layers: Sequence[int] | None = None
) -> list[float]:
    """The summed log-probability of each sequence of a batch, forward only. `layers` are those that run (None: all)."""
    hidden_BTD = model.embed(batch.ids_BT)
    hidden_BTD = model.run_all(
        hidden_BTD, model.layer_context(hidden_BTD, batch.ids_BT, lengths=batch.in_a_row), layers=layers
    )
    selected_ND = hidden_BTD.flatten(0, 1)[batch.supervised_N]
    losses_N = torch.empty(len(selected_ND), dtype=torch.float32, device=selected_ND.device)
    for start in range(0, len(selected_ND), token_tile):
        tile = slice(start, start + token_tile)
        task_loss(model, selected_ND[tile], batch.targets_N[tile], each_N=losses_N[tile])
    return sequence_sums(losses_N, n_targets)


def choice_losses(
    model: Model,
    objective: Objective,
    batches: Sequence[Batch],
    totals: Totals,
    *,
    token_tile: int,
    between: Callable[[], None],
    layers: Sequence[int] | None = None,
) -> dict[str, float]:
    """The objective of held-out batches, as of one window, under "loss", and the means of what is measured."""
    loss, sums = 0.0, dict.fromkeys(MEASURED, 0.0)
    window: ChoiceTotals = present(totals.window)
    for batch in batches:
        between()
        choices = present(batch.choices)
        scored = scored_sequences(choices, log_probs(model, batch, choices.n_targets, token_tile=token_tile, layers=layers))
        judged = objective.judged(scored, window)
        loss += judged.loss
        for name, value in measured(scored, judged, choices.together).items():
            sums[name] += value
    return {"loss": loss, **means(sums, paired=objective.paired)}
