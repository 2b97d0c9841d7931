"""Margins in closed form: from the target's similarity (and the embedding's norm) to its logit and derivatives.

The head (``partial_fc.py``) computes similarities ``q_ij = w_j . u_i`` of class rows and embeddings and needs from
here only what differs between losses. All works on ``[G]`` vectors, elementwise and rank-free, without autograd.

Legend: G samples; ``q`` similarity (the cosine where both sides are normalised, which is the rule); ``norm`` length of
the raw embedding; ``theta = acos(q)``; ``s`` scale; ``m`` margins in radians (m3: cosine units).
Float64 in gives float64 out.

A margin offers, besides ``target``:

* ``scale``: logits of the other classes are ``scale * q`` (``others`` may change them);
* ``normalize_embedding``, ``normalize_weight``: whether ``u`` and ``w`` have unit length;
* ``reduce``: from the G cross-entropies to the loss (the mean, or focal weighting);
* ``extra``: a loss term of the norm alone (MagFace), ``None`` elsewhere;
* ``observe``, ``state``, ``load_state``: running statistics (AdaFace, annealed SphereFace).
"""

import inspect
import math
from typing import NamedTuple

import paddle

from utils.errors import UserError

GRADIENTS = ("exact", "straight_through")
BEYOND_PI = ("cosine", "linear")


class TargetLogit(NamedTuple):
    """Target logit of each sample with its derivatives, each ``[G]``."""

    logit: paddle.Tensor
    d_similarity: paddle.Tensor  # at fixed norm
    d_norm: paddle.Tensor  # at fixed similarity


class Margin:
    """What all losses share: other classes' logits, interclass filtering, reduction of the batch.

    Args:
        s: scale of the logits.
        gradient: ``"exact"`` differentiates the margin; ``"straight_through"`` shifts the target logit and passes the
            gradient as if the shift were constant, ``d logit / d q = scale``, as arcface_torch does.
        interclass_threshold: above 0, a non-target cosine beyond it gets logit 0 and no gradient
            (arcface_torch's ``interclass_filtering_threshold``: a likely mislabelled twin of the class).
        focal_gamma: above 0, focal weighting ``(1 - p)^gamma * L`` with ``p = exp(-L)`` (Lin et al. 2017, eq. 4).
        focal_over: ``"batch"`` takes ``L`` as the mean cross-entropy of the batch, as the ronghuaiyang fork does;
            ``"sample"`` weighs each sample as the paper does.

    Raises:
        UserError: an argument is out of its range.
    """

    normalize_embedding = True
    normalize_weight = True

    def __init__(
        self,
        s: float = 64.0,
        gradient: str = "exact",
        interclass_threshold: float = 0.0,
        focal_gamma: float = 0.0,
        focal_over: str = "batch",
    ):
        if not s > 0:
            raise UserError(f"s: {s} must be above 0")
        if gradient not in GRADIENTS:
            raise UserError(f"gradient: {gradient!r} is not one of {', '.join(GRADIENTS)}")
        if not 0 <= interclass_threshold <= 1:
            raise UserError(f"interclass_threshold: {interclass_threshold} must lie in [0, 1] (0 is off)")
        if not focal_gamma >= 0:
            raise UserError(f"focal_gamma: {focal_gamma} must be 0 (off) or above")
        if focal_over not in ("batch", "sample"):
            raise UserError(f"focal_over: {focal_over!r} is not one of batch, sample")
        self.scale = float(s)
        self.gradient = gradient
        self.interclass_threshold = float(interclass_threshold)
        self.focal_gamma = float(focal_gamma)
        self.focal_over = focal_over

    def target(self, q: paddle.Tensor, norm: paddle.Tensor) -> TargetLogit:
        """Logit of the true class and its derivatives; ``q``, ``norm``: [G]. Pure: no state changes."""
        shaped, d_shaped, d_norm = self._shape(paddle.clip(q, -1.0, 1.0), norm)
        if self.gradient == "straight_through":
            d_shaped, d_norm = paddle.ones_like(q), paddle.zeros_like(q)
        return TargetLogit(self.scale * shaped, self.scale * d_shaped, self.scale * d_norm)

    def _shape(self, cos: paddle.Tensor, norm: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """(psi, d psi / d cos, d psi / d norm) of the target logit ``s * psi``."""
        return cos, paddle.ones_like(cos), paddle.zeros_like(cos)

    @property
    def changes_others(self) -> bool:
        """Whether ``others`` does anything; the head skips it otherwise."""
        return self.interclass_threshold > 0

    def others(self, q):
        """Interclass filtering. ``q``: similarities to the other classes, any shape, Paddle or numpy.

        Returns the filtered similarity (0 where dropped) and the mask that its derivative takes (0 or 1).
        """
        keep = (q <= self.interclass_threshold).astype(q.dtype)
        return q * keep, keep

    def reduce(self, ce: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Cross-entropies ``[G]`` -> (loss, 0-d; d loss / d ce, [G])."""
        num_samples = ce.shape[0]
        gamma = self.focal_gamma
        if gamma == 0:
            return ce.mean(), paddle.full_like(ce, 1.0 / num_samples)
        level = ce.mean() if self.focal_over == "batch" else ce
        p = paddle.exp(-level)
        miss = -paddle.expm1(-level)  # 1 - p, exact near 0
        loss = miss**gamma * level
        # d/dL [(1-p)^g L] = (1-p)^g + g p L (1-p)^(g-1);  L/(1-p) -> 1 as L -> 0, so the power is taken as g.
        ratio = paddle.where(miss > 0, level / paddle.clip(miss, min=1e-30), paddle.ones_like(level))
        slope = miss**gamma * (1.0 + gamma * p * ratio)
        return loss.mean(), paddle.ones_like(ce) * slope / num_samples

    def extra(self, norm: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor] | None:
        """An added loss per sample and its derivative by the norm, each [G]; None if there is none."""
        return None

    def observe(self, norm: paddle.Tensor) -> None:
        """Update running statistics from the norms of one global training batch."""

    def state(self) -> dict[str, float]:
        """Running statistics, JSON-able, equal on all ranks."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        """Take back what ``state`` gave."""
        if state:
            raise UserError(f"{type(self).__name__} keeps no state, but the checkpoint has {sorted(state)}")


class CombinedMargin(Margin):
    """``s * (cos(m1 * theta + m2) - m3)`` (ArcFace, Deng et al. 2019, eq. 4): all three margins at once.

    ArcFace is (1, m, 0), CosFace (Wang et al. 2018, eq. 4) is (1, 0, m), normalised softmax is (1, 0, 0).
    ``d/dcos = m1 sin(m1 theta + m2) / sin(theta)``, the denominator kept above a floor so that cos = +-1 stays finite.

    Args:
        m1, m2, m3: multiplicative angular, additive angular and additive cosine margin.
        easy_margin: the margin applies only where ``cos > 0``; elsewhere the target keeps its cosine.
        beyond_pi: what happens where ``theta + m2 > pi``, where cos(theta + m2) rises again: ``"cosine"`` (default)
            keeps it as the paper's formula has it; ``"linear"`` uses ``cos - m2 sin(m2)`` there (m1 = 1 only).
    """

    def __init__(
        self,
        s: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        easy_margin: bool = False,
        gradient: str = "exact",
        beyond_pi: str = "cosine",
        **common,
    ):
        super().__init__(s=s, gradient=gradient, **common)
        if not m1 > 0:
            raise UserError(f"m1: {m1} must be above 0 (1 leaves the angle as it is)")
        if not (0 <= m2 <= math.pi and 0 <= m3 <= 2):
            raise UserError(f"margins: m2 {m2} must lie in [0, pi] and m3 {m3} in [0, 2]")
        if beyond_pi not in BEYOND_PI:
            raise UserError(f"beyond_pi: {beyond_pi!r} is not one of {', '.join(BEYOND_PI)}")
        if beyond_pi == "linear" and (m1 != 1 or easy_margin):
            raise UserError(f"beyond_pi='linear' needs m1=1 and easy_margin=False, got m1={m1}, {easy_margin}")
        self.m1, self.m2, self.m3 = float(m1), float(m2), float(m3)
        self.easy_margin = easy_margin
        self.beyond_pi = beyond_pi

    def _shape(self, cos, norm):
        d_norm = paddle.zeros_like(cos)
        if self.m1 == 1 and self.m2 == 0:
            shaped, d_shaped = cos - self.m3, paddle.ones_like(cos)
        else:
            angle = self.m1 * paddle.acos(cos) + self.m2
            shaped = paddle.cos(angle) - self.m3
            d_shaped = self.m1 * paddle.sin(angle) / _sine(cos)
        if self.easy_margin:
            margin_on = cos > 0
            return paddle.where(margin_on, shaped, cos), _keep(margin_on, d_shaped), d_norm
        if self.beyond_pi == "linear" and self.m2 > 0:
            within = cos > math.cos(math.pi - self.m2)
            straight = cos - self.m2 * math.sin(self.m2) - self.m3
            return paddle.where(within, shaped, straight), _keep(within, d_shaped), d_norm
        return shaped, d_shaped, d_norm


class SphereFace(Margin):
    """A-Softmax (Liu et al. 2017, eq. 7): ``|x| psi(theta)``, ``psi = (-1)^k cos(m theta) - 2k``, k = [m theta/pi].

    psi falls monotonically over [0, pi]. It is blended with the plain cosine, ``(lambda cos + psi) / (1 + lambda)``,
    lambda annealed as ``max(lambda_min, lambda_base / (1 + lambda_gamma * iteration))`` (the paper's code and the
    ronghuaiyang fork); ``lambda_base=0, lambda_min=0`` switches the blend off.

    Args:
        m: multiplicative angular margin.
        s: None multiplies by the embedding's norm, as the paper does; a number normalises and scales instead.
    """

    def __init__(
        self,
        m: float = 4.0,
        s: float | None = None,
        lambda_min: float = 5.0,
        lambda_base: float = 1000.0,
        lambda_gamma: float = 0.12,
        **common,
    ):
        super().__init__(s=1.0 if s is None else s, **common)
        if not m >= 1:
            raise UserError(f"m: {m} must be at least 1")
        if min(lambda_min, lambda_base, lambda_gamma) < 0:
            raise UserError(f"lambda: {lambda_min}, {lambda_base}, {lambda_gamma} must be 0 or above")
        if s is None and self.interclass_threshold > 0:
            raise UserError("interclass_threshold compares cosines; give sphereface a scale s to use it")
        self.normalize_embedding = s is not None
        self.m = float(m)
        self.lambda_min, self.lambda_base, self.lambda_gamma = lambda_min, lambda_base, lambda_gamma
        self.iteration = 0

    @property
    def blend(self) -> float:
        """lambda of the current iteration."""
        return max(self.lambda_min, self.lambda_base / (1.0 + self.lambda_gamma * self.iteration))

    def target(self, q, norm):
        if self.normalize_embedding:
            return super().target(q, norm)
        length = paddle.clip(norm, min=1e-12)
        cos = paddle.clip(q / length, -1.0, 1.0)
        shaped, d_shaped, _ = self._shape(cos, norm)
        if self.gradient == "straight_through":
            return TargetLogit(length * shaped, paddle.ones_like(q), paddle.zeros_like(q))
        # logit(q, n) = n psi(q / n), so d/dq = psi' and d/dn = psi - cos psi'.
        return TargetLogit(length * shaped, d_shaped, shaped - cos * d_shaped)

    def _shape(self, cos, norm):
        theta = paddle.acos(cos)
        k = paddle.floor(self.m * theta / math.pi)
        sign = 1.0 - 2.0 * paddle.remainder(k, paddle.full_like(k, 2.0))
        psi = sign * paddle.cos(self.m * theta) - 2.0 * k
        d_psi = sign * self.m * paddle.sin(self.m * theta) / _sine(cos)
        blend = self.blend
        return (blend * cos + psi) / (1 + blend), (blend + d_psi) / (1 + blend), paddle.zeros_like(cos)

    def observe(self, norm):
        self.iteration += 1

    def state(self):
        return {"iteration": self.iteration}

    def load_state(self, state):
        self.iteration = int(state["iteration"])


class AdaFace(Margin):
    """AdaFace (Kim et al. 2022, eq. 6 to 10): a margin that follows image quality, read from the embedding's norm.

    ``k = clip((norm - mean) / (std + 1e-3) * h, -1, 1)``; target ``s * (cos(theta - m k) - (m + m k))``, the angle kept
    within [1e-3, pi - 1e-3]. mean and std are running averages over global batches with weight ``t_alpha``; as in the
    paper no gradient flows through the norm. One sample has no deviation and leaves std alone.
    """

    def __init__(self, s: float = 64.0, m: float = 0.4, h: float = 0.333, t_alpha: float = 0.01, **common):
        super().__init__(s=s, **common)
        if not (0 <= m <= math.pi / 2 and h >= 0 and 0 < t_alpha <= 1):
            raise UserError(f"adaface: m {m} in [0, pi/2], h {h} >= 0 and t_alpha {t_alpha} in (0, 1] needed")
        self.m, self.h, self.t_alpha = float(m), float(h), float(t_alpha)
        self.load_state({"mean": 20.0, "std": 100.0})

    def _shape(self, cos, norm):
        mean, std = self._mean.astype(norm.dtype), self._std.astype(norm.dtype)
        quality = (paddle.clip(norm, 1e-3, 100.0) - mean) / (std + 1e-3)
        k = paddle.clip(quality * self.h, -1.0, 1.0)
        wanted = paddle.acos(cos) - self.m * k
        angle = paddle.clip(wanted, 1e-3, math.pi - 1e-3)
        free = (wanted == angle).astype(cos.dtype)
        shaped = paddle.cos(angle) - self.m * (1.0 + k)
        return shaped, free * paddle.sin(angle) / _sine(cos), paddle.zeros_like(cos)

    def observe(self, norm):
        safe = paddle.clip(norm.astype("float64"), 1e-3, 100.0)
        mean = safe.mean()
        # A batch that is not finite is skipped later on; it must not stay in the running averages.
        finite = paddle.isfinite(mean)
        self._mean = paddle.where(finite, self._mean + self.t_alpha * (mean - self._mean), self._mean)
        if (num_samples := norm.shape[0]) > 1:
            std = paddle.sqrt(paddle.square(safe - mean).sum() / (num_samples - 1))  # Tensor.std asks the host
            self._std = paddle.where(finite, self._std + self.t_alpha * (std - self._std), self._std)

    def state(self):
        return {"mean": float(self._mean), "std": float(self._std)}

    def load_state(self, state):
        # On the device, in float64: an update neither reads nor writes them from the host.
        self._mean = paddle.full([], float(state["mean"]), "float64")
        self._std = paddle.full([], float(state["std"]), "float64")


class MagFace(Margin):
    """MagFace (Meng et al. 2021, eq. 2 and 4): the margin grows with the norm a, and a regulariser rewards large norms.

    ``a = clip(norm, l_a, u_a)``; ``m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a)``; target ``s cos(theta + m(a))``;
    added loss ``lambda_g * (a / u_a^2 + 1 / a)``, mean over the batch. The norm carries gradient inside [l_a, u_a].
    """

    def __init__(
        self,
        s: float = 64.0,
        l_a: float = 10.0,
        u_a: float = 110.0,
        l_m: float = 0.45,
        u_m: float = 0.8,
        lambda_g: float = 20.0,
        **common,
    ):
        super().__init__(s=s, **common)
        if not (0 < l_a < u_a and 0 <= l_m <= u_m <= math.pi and lambda_g >= 0):
            raise UserError(
                f"magface: 0 < l_a < u_a, 0 <= l_m <= u_m <= pi, lambda_g >= 0 needed, "
                f"got l_a={l_a}, u_a={u_a}, l_m={l_m}, u_m={u_m}, lambda_g={lambda_g}"
            )
        self.l_a, self.u_a, self.l_m, self.u_m, self.lambda_g = l_a, u_a, l_m, u_m, lambda_g

    def _shape(self, cos, norm):
        slope = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        length = paddle.clip(norm, self.l_a, self.u_a)
        angle = paddle.acos(cos) + self.l_m + slope * (length - self.l_a)
        inside = (norm == length).astype(cos.dtype)
        return paddle.cos(angle), paddle.sin(angle) / _sine(cos), -paddle.sin(angle) * slope * inside

    def extra(self, norm):
        length = paddle.clip(norm, self.l_a, self.u_a)
        inside = (norm == length).astype(norm.dtype)
        loss = self.lambda_g * (length / self.u_a**2 + 1.0 / length)
        return loss, self.lambda_g * (1.0 / self.u_a**2 - 1.0 / length**2) * inside


class LinearLogits(Margin):
    """Plain softmax on bias-free inner products ``w_j . x_i``: no normalisation, no scale, no margin."""

    normalize_embedding = False
    normalize_weight = False

    def __init__(self, **common):
        super().__init__(s=1.0, **common)
        if self.interclass_threshold > 0:
            raise UserError("interclass_threshold compares cosines; linear logits have none")

    def target(self, q, norm):
        return TargetLogit(q, paddle.ones_like(q), paddle.zeros_like(q))


def _arcface(m: float = 0.5, **params) -> Margin:
    return CombinedMargin(m1=1.0, m2=m, m3=0.0, **params)


def _cosface(m: float = 0.4, **params) -> Margin:
    return CombinedMargin(m1=1.0, m2=0.0, m3=m, **params)


MARGINS = {
    "arcface": _arcface,
    "cosface": _cosface,
    "sphereface": SphereFace,
    "combined": CombinedMargin,
    "softmax": lambda **params: CombinedMargin(m1=1.0, m2=0.0, m3=0.0, **params),
    "linear": LinearLogits,
    "adaface": AdaFace,
    "magface": MagFace,
}


def margin_parameters(name: str) -> list[str]:
    """Names of the parameters that ``build_margin(name, ...)`` takes."""
    made = MARGINS[name]
    through = (made, Margin) if isinstance(made, type) else (made, CombinedMargin, Margin)
    parameters = [each for each_made in through for each in inspect.signature(each_made).parameters.values()]
    found = dict.fromkeys(each.name for each in parameters if each.kind is not each.VAR_KEYWORD)
    fixed = {LinearLogits: ("s",)}.get(made, () if isinstance(made, type) else ("m1", "m2", "m3"))
    return [each for each in found if each not in fixed]


def build_margin(name: str, **params) -> Margin:
    """Margin by name (a key of ``MARGINS``) with the parameters of its class.

    Raises:
        UserError: unknown name, unknown parameter, or a value out of range.
    """
    if name not in MARGINS:
        raise UserError(f"margin: {name!r} is not one of {', '.join(sorted(MARGINS))}")
    known = margin_parameters(name)
    if odd := sorted(set(params) - set(known)):
        raise UserError(f"margin {name}: no parameter {odd[0]!r} (head.margin.{odd[0]}); it has {', '.join(known)}")
    try:
        return MARGINS[name](**params)
    except TypeError as error:
        raise UserError(f"margin {name}: {error}") from None


def _sine(cos: paddle.Tensor) -> paddle.Tensor:
    """sin(acos(cos)) kept above a floor: |d cos / d x| shrinks as the sine does, so their quotient stays bounded."""
    floor = 1e-8 if cos.dtype == paddle.float64 else 1e-4
    return paddle.clip(paddle.sqrt((1.0 - cos) * (1.0 + cos)), min=floor)


def _keep(condition: paddle.Tensor, derivative: paddle.Tensor) -> paddle.Tensor:
    """The margin's derivative where it applies, that of the bare cosine (1) elsewhere."""
    return paddle.where(condition, derivative, paddle.ones_like(derivative))
