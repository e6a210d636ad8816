"""Shares of several sorts among samples that do not each allow every sort: drawn in training, dealt in evaluation."""

import numpy as np

CLOSE = 1e-5
"""Difference of shares from their targets at which no more is fitted."""
MOST = 1e8
"""Largest weight by the smallest."""


def fit_weights(allowed: np.ndarray, targets: np.ndarray, groups: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Weights (C,) of sorts, by which draws among the sorts that each sample allows have the target shares in all.

    That is iterative proportional fitting (Deming and Stephan 1940), by sorts and by groups of sorts in turn. Where no
    weights give the targets, since too few samples allow a sort, groups keep their shares as far as may be, and the
    sorts of a group are as near to theirs as samples let them.

    Args:
        allowed: (N, C) bool.
        targets: (C,) shares, together 1; that of a sort that no sample allows goes to the others of its group.
        groups: (C,) the group of each sort, from 0.
        rounds: Number of steps by sorts; as many by groups alone follow.
    """
    whole = np.bincount(groups, targets)
    targets = np.where(allowed.any(0), targets, 0.0)
    there = np.bincount(groups, targets, len(whole))
    targets = targets * (whole / np.maximum(there, 1e-300))[groups]
    weights = targets.copy()
    for step in range(2 * rounds):
        found = drawn_shares(allowed, weights)
        if np.abs(found - targets).max(initial=0.0) < CLOSE:
            break
        if step < rounds:
            weights = _scaled(weights, targets, found)
            found = drawn_shares(allowed, weights)
        weights = _scaled(weights, whole[groups], np.bincount(groups, found, len(whole))[groups])
    return weights


def _scaled(weights: np.ndarray, targets: np.ndarray, found: np.ndarray) -> np.ndarray:
    scaled = np.where(weights > 0, weights * targets / np.maximum(found, 1e-12), 0.0)
    # What few samples allow is drawn wherever it can be: enough for that, and not without bounds.
    least = scaled[scaled > 0].min(initial=np.inf)
    return np.minimum(scaled / least, MOST)


def chances(allowed: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Probabilities (N, C) of sorts for each sample, in proportion to the weights of those it allows."""
    found = allowed * weights
    return found / np.maximum(found.sum(1, keepdims=True), 1e-300)


def drawn_shares(allowed: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shares (C,) of sorts, expected of draws."""
    return chances(allowed, weights).mean(0) if len(allowed) else np.zeros_like(weights)


def dealt(probabilities: np.ndarray) -> list[int]:
    """A sort for each sample, so that at all times sorts have come as often as draws would have them, but for a few.

    Args:
        probabilities: (N, C) of each sort for each sample, 0 for those it does not allow.
    """
    lacking = np.zeros(probabilities.shape[1])
    found = []
    for row in probabilities:
        lacking += row
        sort = int(np.where(row > 0, lacking, -np.inf).argmax())
        lacking[sort] -= 1
        found.append(sort)
    return found
