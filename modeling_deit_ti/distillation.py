"""The distillation modes, and their losses as pure functions of logits.

B images, K labels. Equations and sections refer to "Training data-efficient image transformers & distillation through
attention" (Touvron et al., 2021).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class DistillMode:
    """
    One distillation mode.

    Args:
        name (`str`): its name in `--distill_mode`.
        tokens (`tuple[str, ...]`): the student's learned tokens, each with a head.
        readout (`str`): the head the student predicts with, or `"both"` for the mean of both heads' logits.
        teacher_targets (`str`, *optional*): `"hard"` for the teacher's argmax (equation 3), `"soft"` for its
            distribution (equation 2), `"standardized"` for the distribution of its standardised logits, `None` if the
            mode has no teacher.
        alpha (`float`): weight of the teacher term; the label term has `1 - alpha`.
        temperature (`float`): temperature T of the soft or standardized term.
    """

    name: str
    tokens: tuple[str, ...]
    readout: str
    teacher_targets: str | None
    alpha: float
    temperature: float = 1.0

    @property
    def has_teacher(self) -> bool:
        """Whether the loss needs the teacher."""
        return self.teacher_targets is not None and self.alpha > 0

    @property
    def needs_labels(self) -> bool:
        """Whether the loss needs labels. If not, the mode trains on unlabelled images."""
        return not self.has_teacher or self.alpha < 1

    @property
    def network(self) -> dict:
        """The mode's entries in the student's `DeiTTiConfig`."""
        return {"distill_mode": self.name, "tokens": list(self.tokens), "readout": self.readout}


# The default temperature for each kind of target; for standardized ones, as in their paper (section 5).
TEMPERATURES = {"hard": 1.0, "soft": 3.0, "standardized": 2.0}
# Table 3 of the paper: `class`, `distill` and `both` are one trained network, read out in three ways.
MODES = {
    mode.name: mode
    for mode in (
        DistillMode("none", ("class",), "class", None, 0.0),
        DistillMode("soft", ("class",), "class", "soft", 0.1, TEMPERATURES["soft"]),
        DistillMode("hard", ("class",), "class", "hard", 0.5),
        DistillMode("class", ("class", "distillation"), "class", "hard", 0.5),
        DistillMode("distill", ("class", "distillation"), "distillation", "hard", 0.5),
        DistillMode("both", ("class", "distillation"), "both", "hard", 0.5),
    )
}


def resolve_mode(
    name: str,
    *,
    single_token: bool = False,
    teacher_targets: str | None = None,
    alpha: float | None = None,
    temperature: float | None = None,
) -> DistillMode:
    """
    The mode of that name, a key of `MODES`, with the given options applied.

    Args:
        single_token (`bool`, *optional*, defaults to `False`): for `class` and `distill`, a network with that token
            only. `class` then learns from the labels only, `distill` from the teacher only.
        teacher_targets (`str`, *optional*): `"hard"`, `"soft"` or `"standardized"` for the token modes; for mode
            `soft`, one of the last two.
        alpha (`float`, *optional*): weight of the teacher term, 0 to 1.
        temperature (`float`, *optional*): temperature of the soft or standardized term, above 0.

    Raises:
        ValueError: if the mode is unknown, or an option is out of range or does not apply to that mode.
    """
    if name not in MODES:
        raise ValueError(f"distill_mode must be one of {', '.join(MODES)}, not {name!r}.")
    mode, setting = MODES[name], f"mode {name}" + " with single_token" * single_token
    given = {"teacher_targets": teacher_targets, "distillation_alpha": alpha, "distillation_temperature": temperature}
    if single_token:
        if name not in ("class", "distill"):
            raise ValueError(f"single_token is only for the modes class and distill, not for {name}.")
        if alpha is not None:
            raise ValueError(f"distillation_alpha does not apply to {setting}: its loss has a single term.")
        targets, single_token_alpha = (None, 0.0) if name == "class" else (mode.teacher_targets, 1.0)
        mode = replace(mode, tokens=(mode.readout,), teacher_targets=targets, alpha=single_token_alpha)
    if mode.teacher_targets is None:
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{option} does not apply to {setting}: it has no teacher.")
    if teacher_targets not in (None, *TEMPERATURES):
        raise ValueError(f"teacher_targets must be one of {', '.join(TEMPERATURES)}, not {teacher_targets!r}.")
    if teacher_targets not in (None, mode.teacher_targets):
        matching_mode = "hard" if teacher_targets == "hard" else "soft"
        if name in ("soft", "hard") and name != matching_mode:
            raise ValueError(f"teacher_targets {teacher_targets} contradicts mode {name}: use mode {matching_mode}.")
        mode = replace(mode, teacher_targets=teacher_targets, temperature=TEMPERATURES[teacher_targets])
    if alpha is not None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"distillation_alpha must be between 0 and 1, not {alpha}.")
        mode = replace(mode, alpha=alpha)
    if temperature is not None:
        if mode.teacher_targets == "hard":
            raise ValueError("distillation_temperature only applies with soft or standardized teacher targets.")
        if temperature <= 0:
            raise ValueError(f"distillation_temperature must be above 0, not {temperature}.")
        mode = replace(mode, temperature=temperature)
    return mode


class LossParts(NamedTuple):
    """The loss of a batch and its two unweighted terms, each a scalar, or `None` for a term that the mode lacks."""

    loss: torch.Tensor
    label_loss: torch.Tensor | None
    distillation_loss: torch.Tensor | None


def label_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Cross-entropy between `(B, K)` logits and the true labels, averaged over the batch. The labels are ids `(B,)` or,
    after mixup, distributions `(B, K)`; smoothing spreads a share of their probability evenly over all K.

    With class weights w `(K,)`, an image with label k is weighted by w_k. For a mixed image, with a distribution t
    over the labels, each label's term is weighted by t_k w_k: the loss is the mean over the images of

        sum over k of t_k w_k CE(logits, s_k),  where s_k is label k, smoothed.

    Smoothing comes after the weights: a rare class's large weight must not make it likely for every image. The sum is
    divided by B, not by the total weight of the batch, so that an image counts the same in every batch.
    """
    if class_weights is None:
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    num_labels = logits.shape[-1]
    targets = F.one_hot(labels, num_labels) if labels.ndim == 1 else labels
    targets = targets * class_weights
    smoothed = (1 - label_smoothing) * targets + label_smoothing / num_labels * targets.sum(dim=-1, keepdim=True)
    return F.cross_entropy(logits.float(), smoothed)


def hard_distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy between `(B, K)` logits and the teacher's decisions, averaged over the batch (equation 3)."""
    return F.cross_entropy(logits.float(), teacher_logits.argmax(dim=-1))


def soft_distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    T^2 KL(teacher || student) of `(B, K)` logits, both softened by temperature T; summed over the labels, averaged
    over the batch (equation 2; the authors' code also divides by the number of labels).
    """
    return temperature**2 * F.kl_div(
        F.log_softmax(logits.float() / temperature, dim=-1),
        F.log_softmax(teacher_logits.float() / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def standardized_distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """
    The soft loss of `(B, K)` logits that are first standardised over each image's K labels, z = (logits - mean) /
    standard deviation: the student need not match the scale of the teacher's logits. "Logit standardization in
    knowledge distillation" (Sun et al., 2024, algorithm 1), whose loss also has the factor T^2. The standard deviation
    divides by K, as in the paper; the authors' code divides by K - 1.
    """
    # A layer norm without weights; the epsilon only matters if all logits are the same.
    standardized = (F.layer_norm(x.float(), x.shape[-1:], eps=1e-10) for x in (logits, teacher_logits))
    return soft_distillation_loss(*standardized, temperature)


def distillation_loss(
    mode: DistillMode,
    class_logits: torch.Tensor | None,
    distillation_logits: torch.Tensor | None,
    labels: torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
) -> LossParts:
    """
    The training loss of a mode. The labels teach the class head; the teacher teaches the distillation head, or the
    class head if there is no other.

    Args:
        class_logits (`torch.Tensor` of shape `(B, K)`, *optional*): if the student has a class head.
        distillation_logits (`torch.Tensor` of shape `(B, K)`, *optional*): if it has a distillation head.
        labels (`torch.Tensor` of shape `(B,)` or `(B, K)`, *optional*): needed if `mode.needs_labels`.
        teacher_logits (`torch.Tensor` of shape `(B, K)`, *optional*): needed if `mode.has_teacher`.
        label_smoothing (`float`): smoothing of the true labels.
        class_weights (`torch.Tensor` of shape `(K,)`, *optional*): weight of each label in the label term.
    """
    label_term = label_loss(class_logits, labels, label_smoothing, class_weights) if mode.needs_labels else None
    if not mode.has_teacher:
        return LossParts(label_term, label_term, None)
    student_logits = class_logits if distillation_logits is None else distillation_logits
    if mode.teacher_targets == "hard":
        teacher_term = hard_distillation_loss(student_logits, teacher_logits)
    else:
        loss = soft_distillation_loss if mode.teacher_targets == "soft" else standardized_distillation_loss
        teacher_term = loss(student_logits, teacher_logits, mode.temperature)
    if label_term is None:
        return LossParts(teacher_term, None, teacher_term)
    return LossParts((1 - mode.alpha) * label_term + mode.alpha * teacher_term, label_term, teacher_term)
