"""Objectives over pairs: of two replies to one prompt the chosen one shall become likelier than the rejected one.

With s = log p(reply | prompt), summed over the reply's tokens, r the same under the reference (the base, adapters off), n
the number of the reply's tokens, w the chosen and l the rejected reply, N pairs and T chosen tokens in the accumulation
window:

DPO (arXiv 2305.18290, eq. 7), with label smoothing e as in cDPO (Mitchell 2023, "A note on DPO with noisy preferences"):
    z = beta [(s_w - r_w) - (s_l - r_l)];     loss = -[(1 - e) log sigmoid(z) + e log sigmoid(-z)] / N
    reward = beta (s - r)

SimPO (arXiv 2405.14734, eq. 6), without a reference and with a margin gamma; smoothing as above:
    z = beta (s_w / n_w - s_l / n_l) - gamma;     the same loss;     reward = beta s / n

ORPO (arXiv 2403.07691, eqs. 4 to 7), without a reference; m = s / n is the mean log-probability of a reply's token:
    odds = e^m / (1 - e^m);     z = log odds_w - log odds_l;     loss = -s_w / T - lambda log sigmoid(z) / N
    reward = lambda m
The paper's likelihood is of the chosen reply given the prompt, so the prompt's tokens are no targets here; TRL's trainer
counts them (trl/experimental/orpo, read at 1.16).

All three differentiate by hand; d log sigmoid(z) / dz = sigmoid(-z).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import expm1, log

from lopt_edge.objectives.objective import Judged, Objective, Scored, Window, log_sigmoid, sigmoid

LEAST_DOUBT = 1e-7  # 1 - p of a token's mean probability: fp32 sums tell no smaller ones from 0, where odds are infinite


def _separated(z: float, smoothing: float) -> tuple[float, float]:
    """The loss of a pair whose rewards are z apart, and its slope by z."""
    loss = -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z)
    return loss, -(1 - smoothing) * sigmoid(-z) + smoothing * sigmoid(z)


def _dpo(pair: tuple[Scored, ...], settings: Mapping[str, float], window: Window) -> Judged:
    beta = settings["beta"]
    chosen, rejected = (beta * (one.log_prob - one.reference) for one in pair)
    loss, slope = _separated(chosen - rejected, settings["label_smoothing"])
    slope *= beta / window.n_units
    return Judged(loss / window.n_units, (slope, -slope), (chosen, rejected))


def _simpo(pair: tuple[Scored, ...], settings: Mapping[str, float], window: Window) -> Judged:
    beta = settings["beta"]
    chosen, rejected = (beta * one.log_prob / one.n_targets for one in pair)
    loss, slope = _separated(chosen - rejected - settings["simpo_gamma"], settings["label_smoothing"])
    slope *= beta / window.n_units
    return Judged(loss / window.n_units, (slope / pair[0].n_targets, -slope / pair[1].n_targets), (chosen, rejected))


def _orpo(pair: tuple[Scored, ...], settings: Mapping[str, float], window: Window) -> Judged:
    weight = settings["orpo_lambda"]
    means = [one.log_prob / one.n_targets for one in pair]
    doubts = [max(-expm1(mean), LEAST_DOUBT) if mean <= 0 else LEAST_DOUBT for mean in means]  # 1 - p
    chosen, rejected = (mean - log(doubt) for mean, doubt in zip(means, doubts, strict=True))
    loss, slope = _separated(chosen - rejected, 0.0)
    slope *= weight / window.n_units
    slopes = [sign * slope / doubt / one.n_targets for sign, doubt, one in zip((1, -1), doubts, pair, strict=True)]
    likelihood = -pair[0].log_prob / window.n_preferred_targets
    total = likelihood + weight * loss / window.n_units
    return Judged(total, (slopes[0] - 1 / window.n_preferred_targets, slopes[1]), tuple(weight * mean for mean in means))


DPO = Objective("dpo", True, _dpo, {"beta": 0.1, "label_smoothing": 0.0}, reads_reference=True)
SIMPO = Objective("simpo", True, _simpo, {"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.0})
ORPO = Objective("orpo", True, _orpo, {"orpo_lambda": 0.1}, rate=8e-6)
