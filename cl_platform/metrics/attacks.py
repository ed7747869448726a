"""Membership inference (4.3.8): can one tell from a model's answers which images it was trained on?

A score is higher for images that look more like members. Low attack scores prove nothing; values are to be compared
with those of a model that never learnt the task, and a value below one half is as telling as one above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cl_platform.metrics.measured import Measured, undefined

DRAWS = 1000
"""Bootstrap draws of a standard error."""
DRAWN_AT_ONCE = 1_000_000
"""Scores of one side that a bootstrap holds at a time."""
FALSE_ALARMS = 0.01
"""Share of non-members that ``mia_tpr_at_1fpr`` lets pass for members."""
OWN_SPREAD = 32
"""Models of a side from which on each image has a standard deviation of its own."""
LEAST_SPREAD = 1e-6
DELTA = 1e-5
LEAST_MODELS = 20
"""Models of a side that ``mia_eps_lower`` needs."""
LEAST_IMAGES = 10
"""Images of each set that ``mia_efficacy`` needs."""
NOT_AN_ANSWER = "the classes are none that the model can answer"


# -- scores ---------------------------------------------------------------------------------------------------------


def loss_scores(logits: Tensor, classes: Sequence[int], labels: Tensor) -> Tensor | None:
    """Minus the cross-entropy (n,) over all classes; ``None`` where a label is not among ``classes``.

    Args:
        logits: (n, S).
        classes: class id of each column.
        labels: class ids (n,).
    """
    columns = _columns(classes, labels)
    if columns is None:
        return None
    return logits.double().log_softmax(dim=1).gather(1, columns[:, None].to(logits.device))[:, 0].cpu()


def entropy_scores(logits: Tensor) -> Tensor:
    """Minus the entropy (n,) of the softmax: needs no label."""
    log = logits.double().log_softmax(dim=1)
    return torch.where(log.isfinite(), log.exp() * log, 0.0).sum(dim=1).cpu()


def msp_scores(logits: Tensor) -> Tensor:
    """Largest probability (n,): needs no label."""
    return logits.double().softmax(dim=1).max(dim=1).values.cpu()


def phi(logits: Tensor, classes: Sequence[int], labels: Tensor) -> Tensor | None:
    """Logit of the label's probability (n,), ``z_y - logsumexp of the other z`` (Carlini et al. 2022).

    ``None`` where a label is not among ``classes``, or there is no other class.
    """
    columns = _columns(classes, labels)
    if columns is None or logits.shape[1] < 2:
        return None
    return _against_others(logits, columns)


def phi_msp(logits: Tensor, classes: Sequence[int], common: Sequence[int]) -> Tensor | None:
    """As :func:`phi`, for the class of the largest logit among ``common``: needs no label.

    ``None`` with fewer than two common classes.
    """
    place = {class_id: column for column, class_id in enumerate(classes)}
    kept = logits[:, [place[class_id] for class_id in common]]
    return _against_others(kept, kept.argmax(dim=1)) if kept.shape[1] > 1 else None


def _columns(classes: Sequence[int], labels: Tensor) -> Tensor | None:
    place = {class_id: column for column, class_id in enumerate(classes)}
    found = [place.get(int(label), -1) for label in labels]
    return None if -1 in found else torch.tensor(found, dtype=torch.int64)


def _against_others(logits: Tensor, columns: Tensor) -> Tensor:
    z, own = logits.double().cpu(), columns.cpu()[:, None]
    others = z.scatter(1, own, -math.inf)
    return z.gather(1, own)[:, 0] - others.logsumexp(dim=1)


# -- figures of a score ---------------------------------------------------------------------------------------------


def mia_auc(members: Tensor, others: Tensor, generator: torch.Generator | None = None, draws: int = DRAWS) -> Measured:
    """[0, 1]: share of pairs in which the member scores higher, a tie counting one half.

    Args:
        members: scores (n,) of images that were trained on.
        others: scores (m,) of images that were not.
        generator: of the bootstrap draws behind the standard error; none without it. Each draw resamples both sides.
        draws: how many.
    """
    if not len(members) or not len(others):
        return undefined("there are no such images")
    levels = _levels(members, others)
    value = float(_pairs_won(*(part[None].double() for part in levels))[0])
    if generator is None:
        return Measured(value)
    most = max(1, DRAWN_AT_ONCE // max(len(members), len(others)))
    sizes = [min(most, draws - done) for done in range(0, draws, most)]
    drawn = torch.cat([_pairs_won(*(_resampled(part, size, generator) for part in levels)) for size in sizes])
    return Measured(value, error=float(drawn.std()))


def _levels(members: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each side stand at each distinct score, ascending."""
    scores, place = torch.cat((members, others)).double().unique(return_inverse=True)
    count = len(scores)
    return (
        torch.bincount(place[: len(members)], minlength=count),
        torch.bincount(place[len(members) :], minlength=count),
    )


def _pairs_won(members: Tensor, others: Tensor) -> Tensor:
    """AUC (b,) from counts (b, levels), exact: products of counts stay below 2^53."""
    below = others.cumsum(dim=1) - others
    won = (members * (below + 0.5 * others)).sum(dim=1)
    return won / (members.sum(dim=1) * others.sum(dim=1))


def _resampled(counts: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Counts (draws, levels) of as many scores as there were, drawn anew with replacement."""
    total = int(counts.sum())
    chosen = torch.randint(total, (draws, total), generator=generator)
    place = torch.searchsorted(counts.cumsum(dim=0), chosen, right=True)
    empty = torch.zeros(draws, len(counts), dtype=torch.float64)
    return empty.scatter_add_(1, place, torch.ones_like(place, dtype=torch.float64))


def mia_adv(members: Tensor, others: Tensor) -> Measured:
    """[0, 1]: largest difference of the shares of members and of others at or above a threshold.

    The threshold is chosen on the very scores it is judged by, so the value is optimistic for the attack.
    """
    if not len(members) or not len(others):
        return undefined("there are no such images")
    hits, alarms = _at_or_above(members, others)
    return Measured(max(0.0, float((hits / len(members) - alarms / len(others)).max())))


def tpr_at(members: Tensor, others: Tensor, limit: float) -> float:
    """Largest share of members at or above a threshold that at most ``limit`` of the others reach.

    Scores at the threshold count on both sides.
    """
    hits, alarms = _at_or_above(members, others)
    allowed = alarms <= math.floor(limit * len(others) + 1e-9)
    return float(hits[allowed].max()) / len(members) if bool(allowed.any()) else 0.0


def mia_tpr_at_1fpr(members: Tensor, others: Tensor) -> Measured:
    """[0, 1]: share of members found with false alarms for at most 1 % of the others; needs 100 of them."""
    if not len(members) or not len(others):
        return undefined("there are no such images")
    if FALSE_ALARMS * len(others) < 1:
        return undefined(f"needs >= {round(1 / FALSE_ALARMS)} non-members, has {len(others)}")
    return Measured(tpr_at(members, others, FALSE_ALARMS))


def _at_or_above(members: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of members and of others at or above each distinct score, (levels,)."""
    return tuple(part.flip(0).cumsum(dim=0).flip(0).double() for part in _levels(members, others))  # type: ignore[return-value]


# -- shadow models --------------------------------------------------------------------------------------------------


def lira_offline(own: Tensor, out: Tensor) -> Tensor:
    """Score (n,) of an image under models that never saw it: ``Phi((phi - mean) / spread)``, one-sided.

    Args:
        own: phi (n,) of the model under attack.
        out: phi (N, n) of N models that never saw the images, N at least 2.
    """
    score: Tensor = torch.special.ndtr(lira_deviation(own, out))
    return score


def lira_deviation(own: Tensor, out: Tensor) -> Tensor:
    """What :func:`lira_offline` takes Phi of: it ranks images alike, also where Phi rounds to 1."""
    mean, spread = _gaussian(out)
    return (own.double() - mean) / spread


def lira_online(own: Tensor, out: Tensor, inside: Tensor) -> Tensor:
    """Score (n,): log density under models that learnt and forgot the image minus that under those that never saw it.

    Args:
        own: phi (n,) of the model under attack.
        out: phi (N, n) of models that never saw the images.
        inside: phi (M, n) of models that learnt them and forgot them by the method under attack.
    """
    return _log_density(own, inside) - _log_density(own, out)


def _log_density(own: Tensor, models: Tensor) -> Tensor:
    mean, spread = _gaussian(models)
    return -0.5 * ((own.double() - mean) / spread).square() - spread.log()


def _gaussian(models: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (n,) and sample standard deviation (n,): of each image with many models, else one over all images."""
    if models.dim() != 2 or len(models) < 2:
        raise ValueError(f"phi {tuple(models.shape)}: at least 2 models are needed")
    values = models.double()
    variance = values.var(dim=0, unbiased=True)
    if len(models) < OWN_SPREAD:
        variance = variance.mean().expand_as(variance)  # equally many models an image: the pooled variance
    return values.mean(dim=0), variance.sqrt().clamp_min(LEAST_SPREAD)


# -- a bound on epsilon ---------------------------------------------------------------------------------------------


def upper_bound(errors: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson upper bound of a rate of which ``errors`` in ``trials`` were seen.

    Raises:
        ValueError: counts that contradict each other.
    """
    if not 0 <= errors <= trials or trials == 0:
        raise ValueError(f"{errors} errors in {trials} trials")
    if errors == trials:
        return 1.0
    from scipy.stats import beta

    return float(beta.ppf(confidence, errors + 1, trials - errors))


def eps_lower(false_alarms: int, references: int, misses: int, unlearned: int, delta: float = DELTA) -> float:
    """Lower bound of the epsilon of any (epsilon, delta) guarantee, from a test's errors; joint confidence 90 %.

    Args:
        false_alarms: references called unlearnt, of ``references``.
        references: models that never learnt the image.
        misses: unlearnt models called references, of ``unlearned``.
        unlearned: models that learnt and forgot it.
        delta: of the guarantee.
    """
    fpr, fnr = upper_bound(false_alarms, references), upper_bound(misses, unlearned)
    bounds = [math.log((1 - delta - a) / b) for a, b in ((fpr, fnr), (fnr, fpr)) if 1 - delta - a > 0]
    return max([0.0, *bounds])


def mia_eps_lower(unlearned: Tensor, references: Tensor) -> Measured:
    """From 0: :func:`eps_lower` of a threshold test between models that forgot and models that never learnt.

    Image, threshold and direction are chosen on every other model and judged on the rest. 0 proves nothing.

    Args:
        unlearned: scores (S, n) of S models that learnt and forgot the images.
        references: scores (S', n) of models that never learnt them.
    """
    fewest = min(len(unlearned), len(references))
    if fewest < LEAST_MODELS:
        return undefined(f"needs >= {LEAST_MODELS} models of each kind, has {fewest}")
    u, r = unlearned.double(), references.double()
    best, chosen = -math.inf, (0, 0.0, 1.0)
    for image in range(u.shape[1]):
        for sign in (1.0, -1.0):
            hits, alarms = _at_or_above(sign * u[::2, image], sign * r[::2, image])
            scores = torch.cat((sign * u[::2, image], sign * r[::2, image])).unique()
            apart = hits / len(u[::2]) - alarms / len(r[::2])
            place = int(apart.argmax())
            if float(apart[place]) > best:
                best, chosen = float(apart[place]), (image, _between(scores, place), sign)
    image, threshold, sign = chosen
    alarms_left = int((sign * r[1::2, image] >= threshold).sum())
    missed = int((sign * u[1::2, image] < threshold).sum())
    return Measured(eps_lower(alarms_left, len(r[1::2]), missed, len(u[1::2])))


def _between(scores: Tensor, place: int) -> float:
    """Halfway to the score below, where there is one: a threshold on a seen score would miss the next one by a hair."""
    return float(scores[place] if place == 0 else (scores[place - 1] + scores[place]) / 2)


# -- the attack of the unlearning literature ------------------------------------------------------------------------


def mia_efficacy(members: Tensor | None, others: Tensor | None, forgotten: Tensor | None) -> Measured:
    """4.3.2, [0, 1]: share of the forgotten images that a support vector machine calls non-members.

    Trained on the probability of the true class (C 3, radial kernel, gamma ``auto``), as in SalUn's released code.

    Args:
        members: probabilities (n,) of kept training images; ``None``: their classes are no answers of the model.
        others: probabilities (m,) of kept test images; of each side as many as the smaller one has enter.
        forgotten: probabilities (f,) of the forgotten training images.
    """
    if members is None or others is None or forgotten is None:
        return undefined(NOT_AN_ANSWER)
    fewest = min(len(members), len(others), len(forgotten))
    if fewest < LEAST_IMAGES:
        return undefined(f"needs >= {LEAST_IMAGES} images of each set, has {fewest}")
    from sklearn.svm import SVC

    known = torch.cat((members, others)).double().cpu().numpy()[:, None]
    machine = SVC(C=3, kernel="rbf", gamma="auto")
    machine.fit(known, [1] * len(members) + [0] * len(others))
    return efficacy_of(machine.predict(forgotten.double().cpu().numpy()[:, None]).tolist())


def efficacy_of(calls: Sequence[int]) -> Measured:
    """Share of calls that are 0, non-member."""
    if not calls:
        return undefined("there are no such images")
    return Measured(sum(call == 0 for call in calls) / len(calls))
