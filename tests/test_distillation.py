"""The modes and their losses, checked against NumPy."""

import numpy as np
import pytest
import torch

from modeling_deit_ti.distillation import MODES, distillation_loss, label_loss, resolve_mode


RNG = np.random.default_rng(0)
CLASS, DISTILLATION, TEACHER = RNG.normal(size=(3, 4, 6)) * 3
LABELS = np.array([2, 0, 5, 5])
MIXED = RNG.dirichlet(np.ones(6), size=4)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def cross_entropy(logits, targets, smoothing=0.0):
    if targets.ndim == 1:
        targets = np.eye(6)[targets]
    targets = (1 - smoothing) * targets + smoothing / 6
    return -(targets * log_softmax(logits)).sum(axis=-1).mean()


def kl(teacher, student, temperature):
    teacher, student = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return (np.exp(teacher) * (teacher - student)).sum(axis=-1).mean() * temperature**2


def computed(mode, labels=LABELS, smoothing=0.1):
    parts = distillation_loss(
        mode,
        torch.tensor(CLASS) if "class" in mode.tokens else None,
        torch.tensor(DISTILLATION) if "distillation" in mode.tokens else None,
        None if labels is None else torch.tensor(labels),
        torch.tensor(TEACHER) if mode.has_teacher else None,
        smoothing,
    )
    return [None if part is None else part.item() for part in parts]


@pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["labels", "mixed labels"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "alpha", "teacher_term"),
    [
        ("none", 0.0, None),
        ("soft", 0.1, lambda: kl(TEACHER, CLASS, 3.0)),
        ("hard", 0.5, lambda: cross_entropy(CLASS, TEACHER.argmax(-1))),
        ("class", 0.5, lambda: cross_entropy(DISTILLATION, TEACHER.argmax(-1))),
        ("distill", 0.5, lambda: cross_entropy(DISTILLATION, TEACHER.argmax(-1))),
        ("both", 0.5, lambda: cross_entropy(DISTILLATION, TEACHER.argmax(-1))),
    ],
)
def test_each_modes_loss_matches_the_paper(name, alpha, teacher_term, labels, smoothing):
    label_term = cross_entropy(CLASS, labels, smoothing)
    expected = (1 - alpha) * label_term + (alpha * teacher_term() if teacher_term else 0)
    loss, label_part, teacher_part = computed(MODES[name], labels, smoothing)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert label_part == pytest.approx(label_term, rel=1e-6)
    assert teacher_part == (pytest.approx(teacher_term(), rel=1e-6) if teacher_term else None)


@pytest.mark.parametrize("name", ["class", "distill", "both"])
def test_soft_targets_replace_the_token_modes_hard_term_at_temperature_three(name):
    loss, *_ = computed(resolve_mode(name, teacher_targets="soft"))
    assert loss == pytest.approx(
        0.5 * cross_entropy(CLASS, LABELS, 0.1) + 0.5 * kl(TEACHER, DISTILLATION, 3.0), rel=1e-6
    )


def standardize(logits):
    return (logits - logits.mean(axis=-1, keepdims=True)) / logits.std(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "alpha", "student"), [("soft", 0.1, CLASS), ("class", 0.5, DISTILLATION), ("both", 0.5, DISTILLATION)]
)
def test_standardized_targets_compare_z_scores_at_temperature_two(name, alpha, student):
    loss, _, teacher_part = computed(resolve_mode(name, teacher_targets="standardized"))
    expected = kl(standardize(TEACHER), standardize(student), 2.0)
    assert teacher_part == pytest.approx(expected, rel=1e-6)
    assert loss == pytest.approx((1 - alpha) * cross_entropy(CLASS, LABELS, 0.1) + alpha * expected, rel=1e-6)


def test_standardized_targets_ignore_shift_and_scale_of_the_logits():
    mode = resolve_mode("soft", teacher_targets="standardized", alpha=1.0, temperature=1.5)
    logits, teacher = torch.tensor(CLASS), torch.tensor(TEACHER)
    loss = distillation_loss(mode, logits, None, None, teacher).loss
    assert loss.item() == pytest.approx(kl(standardize(TEACHER), standardize(CLASS), 1.5), rel=1e-6)
    scales, shifts = torch.tensor([[0.1], [1], [5], [20]]), torch.tensor([[3], [0], [-40], [1]])
    for changed in ((logits * scales + shifts, teacher), (logits, teacher * scales + shifts)):
        torch.testing.assert_close(distillation_loss(mode, changed[0], None, None, changed[1]).loss, loss)
    same_opinion = distillation_loss(mode, teacher * scales + shifts, None, None, teacher)
    assert same_opinion.loss.item() == pytest.approx(0, abs=1e-6)


def test_constant_logits_have_a_finite_standardized_loss_and_gradient():
    mode = resolve_mode("soft", teacher_targets="standardized", alpha=1.0)
    logits = torch.ones(4, 6, requires_grad=True)
    loss = distillation_loss(mode, logits, None, None, torch.tensor(TEACHER)).loss
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.5, 10.0])
def test_temperature_softens_both_sides_and_scales_by_its_square(temperature):
    mode = resolve_mode("soft", alpha=1.0, temperature=temperature)
    assert computed(mode)[0] == pytest.approx(kl(TEACHER, CLASS, temperature), rel=1e-6)


@pytest.mark.parametrize("name", ["soft", "hard", "both"])
def test_alpha_zero_learns_only_from_the_labels_and_needs_no_teacher(name):
    mode = resolve_mode(name, alpha=0.0)
    assert not mode.has_teacher and mode.needs_labels
    loss, label_part, teacher_part = computed(mode)
    assert loss == label_part == pytest.approx(cross_entropy(CLASS, LABELS, 0.1), rel=1e-6) and teacher_part is None


@pytest.mark.parametrize(("name", "student"), [("hard", CLASS), ("both", DISTILLATION)])
def test_alpha_one_learns_only_from_the_teacher_and_needs_no_labels(name, student):
    mode = resolve_mode(name, alpha=1.0)
    assert mode.has_teacher and not mode.needs_labels
    loss, label_part, teacher_part = computed(mode, labels=None)
    assert loss == teacher_part == pytest.approx(cross_entropy(student, TEACHER.argmax(-1)), rel=1e-6)
    assert label_part is None


def test_alpha_weights_the_two_terms():
    expected = 0.7 * cross_entropy(CLASS, LABELS, 0.1) + 0.3 * cross_entropy(DISTILLATION, TEACHER.argmax(-1))
    assert computed(resolve_mode("both", alpha=0.3))[0] == pytest.approx(expected, rel=1e-6)


def test_single_class_token_learns_from_the_labels_only():
    mode = resolve_mode("class", single_token=True)
    assert mode.tokens == ("class",) and mode.readout == "class" and not mode.has_teacher
    loss, label_part, teacher_part = computed(mode)
    assert loss == label_part == pytest.approx(cross_entropy(CLASS, LABELS, 0.1), rel=1e-6) and teacher_part is None


def test_single_distillation_token_learns_from_the_teacher_only():
    mode = resolve_mode("distill", single_token=True)
    assert mode.tokens == ("distillation",) and mode.readout == "distillation" and not mode.needs_labels
    loss, label_part, teacher_part = computed(mode, labels=None)
    assert loss == teacher_part == pytest.approx(cross_entropy(DISTILLATION, TEACHER.argmax(-1)), rel=1e-6)
    assert label_part is None


def test_the_teachers_decision_is_never_smoothed():
    assert computed(resolve_mode("hard", alpha=1.0), smoothing=0.3) == computed(
        resolve_mode("hard", alpha=1.0), smoothing=0.0
    )


def test_each_term_trains_its_own_head_only():
    heads = [torch.tensor(logits, requires_grad=True) for logits in (CLASS, DISTILLATION)]
    parts = distillation_loss(MODES["both"], *heads, torch.tensor(LABELS), torch.tensor(TEACHER))
    on_class, on_distillation = torch.autograd.grad(parts.label_loss, heads, retain_graph=True, allow_unused=True)
    assert on_class is not None and on_distillation is None
    on_class, on_distillation = torch.autograd.grad(parts.distillation_loss, heads, allow_unused=True)
    assert on_class is None and on_distillation is not None


def test_half_precision_logits_give_a_float32_loss():
    parts = distillation_loss(
        MODES["both"],
        *(torch.tensor(x).bfloat16() for x in (CLASS, DISTILLATION)),
        torch.tensor(LABELS),
        torch.tensor(TEACHER).bfloat16(),
    )
    assert all(part.dtype == torch.float32 for part in parts)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("medium", {}, "none, soft, hard, class, distill, both"),
        ("hard", {"single_token": True}, "not for hard"),
        ("none", {"alpha": 0.5}, "it has no teacher"),
        ("none", {"teacher_targets": "soft"}, "it has no teacher"),
        ("hard", {"teacher_targets": "soft"}, "use mode soft"),
        ("soft", {"teacher_targets": "hard"}, "use mode hard"),
        ("hard", {"teacher_targets": "standardized"}, "use mode soft"),
        ("none", {"teacher_targets": "standardized"}, "it has no teacher"),
        ("both", {"teacher_targets": "firm"}, "hard, soft, standardized"),
        ("both", {"alpha": 1.5}, "between 0 and 1"),
        ("both", {"temperature": 2.0}, "with soft or standardized teacher targets"),
        ("soft", {"temperature": 0.0}, "above 0"),
        ("class", {"single_token": True, "alpha": 0.5}, "its loss has a single term"),
        ("distill", {"single_token": True, "alpha": 0.5}, "its loss has a single term"),
        ("class", {"single_token": True, "teacher_targets": "soft"}, "it has no teacher"),
    ],
)
def test_options_meaningless_in_a_mode_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        resolve_mode(name, **options)


def test_class_weights_scale_each_share_of_a_label_before_smoothing():
    weights = np.array([0.5, 4.0, 1.0, 1.0, 0.0, 2.0])
    for labels, shares in ((LABELS, np.eye(6)[LABELS]), (MIXED, MIXED)):
        label_term = np.mean(
            [
                sum(weights[k] * image[k] * cross_entropy(logits[None], np.array([k]), 0.1) for k in range(6))
                for image, logits in zip(shares, CLASS, strict=True)
            ]
        )
        arguments = [torch.tensor(values) for values in (CLASS, DISTILLATION, labels, TEACHER)]
        parts = distillation_loss(MODES["both"], *arguments, 0.1, torch.tensor(weights))
        assert parts.label_loss.item() == pytest.approx(label_term, rel=1e-5)
        assert parts.distillation_loss.item() == pytest.approx(
            cross_entropy(DISTILLATION, TEACHER.argmax(-1)), rel=1e-5
        )
        assert parts.loss.item() == pytest.approx(0.5 * (parts.label_loss + parts.distillation_loss).item(), rel=1e-5)


def test_weights_of_one_change_nothing():
    logits = torch.tensor(CLASS)
    for labels in (torch.tensor(LABELS), torch.tensor(MIXED)):
        unweighted = label_loss(logits, labels, 0.1)
        torch.testing.assert_close(label_loss(logits, labels, 0.1, torch.ones(6)), unweighted)
