"""The margin softmax as its definition reads: dense, float64, numpy; gradients by complex steps.

Shares nothing with the implementation: no chunk, no closed form. ``Im f(x + ih) / h`` is the derivative to rounding.
"""

import numpy as np

STEP = 1e-30


def _length(x):
    return np.sqrt((x * x).sum(-1, keepdims=True))


def arcface(cos, norm, m=0.5):
    return np.cos(np.arccos(cos) + m)


def cosface(cos, norm, m=0.4):
    return cos - m


def softmax(cos, norm):
    return cos


def combined(cos, norm, m1=0.9, m2=0.3, m3=0.2):
    return np.cos(m1 * np.arccos(cos) + m2) - m3


def magface(cos, norm):
    """Norms within [10, 110]."""
    return np.cos(np.arccos(cos) + 0.45 + 0.35 * (norm - 10) / 100)


def adaface(cos, norm, mean=20.0, std=100.0):
    """Quality carries no gradient."""
    k = np.clip((np.clip(norm.real, 1e-3, 100) - mean) / (std + 1e-3) * 0.333, -1, 1)
    return np.cos(np.arccos(cos) - 0.4 * k) - 0.4 - 0.4 * k


def dense_loss(
    w_CD, x_GD, label_G, psi, s=64.0, *, classes=None, threshold=0.0, gamma=0.0, lambda_g=0.0, linear=False, raw=False
):
    """Mean loss. ``classes``: ids that take part (None: all); ``raw``: logits carry the norm instead of s."""
    keep = np.arange(len(w_CD)) if classes is None else np.unique(np.concatenate([classes, label_G]))
    w_SD, label_G = w_CD[keep], np.searchsorted(keep, label_G)
    rows = np.arange(len(label_G))
    norm_G1 = _length(x_GD)
    if linear:
        z_GS = x_GD @ w_SD.T
    else:
        q_GS = (x_GD / norm_G1) @ (w_SD / _length(w_SD)).T
        target_G = psi(q_GS[rows, label_G], norm_G1[:, 0])
        if threshold:
            q_GS = np.where(q_GS.real > threshold, 0.0, q_GS)
        q_GS[rows, label_G] = target_G
        z_GS = q_GS * (norm_G1 if raw else s)
    z_GS = z_GS - z_GS.real.max(1, keepdims=True)
    loss = (np.log(np.exp(z_GS).sum(1)) - z_GS[rows, label_G]).mean()
    if gamma:
        loss = (1 - np.exp(-loss)) ** gamma * loss
    if lambda_g:
        loss = loss + lambda_g * (norm_G1 / 110**2 + 1 / norm_G1).mean()
    return loss


def dense_gradients(w_CD, x_GD, label_G, psi, s=64.0, **options):
    """(loss, d loss / d w, d loss / d x)."""
    gradients = []
    for which in (0, 1):
        at = [w_CD.astype(complex), x_GD.astype(complex)]
        gradient = np.zeros(at[which].shape)
        for index in np.ndindex(gradient.shape):
            at[which][index] += 1j * STEP
            gradient[index] = dense_loss(*at, label_G, psi, s, **options).imag / STEP
            at[which][index] -= 1j * STEP
        gradients.append(gradient)
    return dense_loss(w_CD, x_GD, label_G, psi, s, **options), *gradients


def max_norm(ours, reference) -> float:
    """Largest difference over the largest reference value."""
    return float(np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max())
