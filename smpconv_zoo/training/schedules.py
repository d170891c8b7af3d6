"""Learning rate of every optimizer step, as arrays; no optimizer, no state.

Two schedules repeat what the authors' code (sangnekim/SMPConv, commit de4e59a) does, quirks included, so that its runs
can be repeated: `cosine_schedule` (ImageNet) and `sequence_schedule` (sequence tasks and CIFAR-10). `warmup_cosine` is
the one to use for new work. The cosine is that of Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts.
"""

import numpy as np

__all__ = ["cosine_schedule", "sequence_schedule", "warmup_cosine"]


def _cosine(start: float, end: float, progress: np.ndarray) -> np.ndarray:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * progress))


def _check_steps(total_steps: int, warmup_steps: int) -> None:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warm-up must be shorter than training: {warmup_steps} of {total_steps} steps.")


def cosine_schedule(
    base: float,
    final: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int = 0,
    start_warmup: float = 0.0,
    warmup_steps: int = -1,
) -> np.ndarray:
    """The reference's ImageNet schedule: linear warm-up, then a cosine; also used for weight decay.

    Its quirks: the warm-up includes both ends, so the first step has rate `start_warmup` (0: nothing is learned) and
    `base` is used twice; the cosine stops one step short of `final`.

    Args:
        base: rate at the end of the warm-up.
        final: rate the cosine approaches.
        epochs: number of epochs.
        steps_per_epoch: optimizer steps of an epoch.
        warmup_epochs: epochs of warm-up.
        start_warmup: first rate of the warm-up.
        warmup_steps: if positive, length of the warm-up in steps instead; `warmup_epochs` must be positive even then.

    Returns:
        (epochs * steps_per_epoch,) float64.

    Raises:
        ValueError: a size is out of range, or warm-up steps are given without warm-up epochs (where the reference
            fails an assertion).
    """
    if epochs < 1 or steps_per_epoch < 1 or warmup_epochs < 0:
        raise ValueError(
            f"epochs and steps_per_epoch must be positive and warmup_epochs not negative, "
            f"got {epochs}, {steps_per_epoch} and {warmup_epochs}."
        )
    if warmup_steps > 0 and warmup_epochs == 0:
        raise ValueError(f"warmup_steps={warmup_steps} needs warmup_epochs of at least 1, got 0.")
    total = epochs * steps_per_epoch
    warmup = warmup_steps if warmup_steps > 0 else warmup_epochs * steps_per_epoch
    if warmup > total:
        raise ValueError(f"warm-up cannot be longer than training: {warmup} of {total} steps.")
    after = total - warmup
    return np.concatenate(
        [np.linspace(start_warmup, base, warmup), _cosine(base, final, np.arange(after) / max(after, 1))]
    )


def sequence_schedule(base: float, total_steps: int, warmup_steps: int, final: float = 1e-6) -> np.ndarray:
    """The reference's schedule of the sequence tasks, for one parameter group (radii: base times their factor).

    Its quirks: step 0 has rate 0; the warm-up takes one step too many and ends at base * (1 + 1 / warmup_steps); the
    cosine starts from there, because torch's CosineAnnealingLR multiplies the present rate recursively instead of
    looking at the base rate, and it is cut off two steps before `final`. The factors of the recursion telescope into
    the closed form used here.

    Args:
        base: rate of the group.
        total_steps: optimizer steps of the whole training. (The reference counts them from hard-coded data set sizes.)
        warmup_steps: 0 for none: then a cosine from `base` (the reference's `warmup_epochs=-1`).
        final: rate the cosine approaches, in every group the same.

    Returns:
        (total_steps,) float64.

    Raises:
        ValueError: not 0 <= warmup_steps < total_steps.
    """
    _check_steps(total_steps, warmup_steps)
    step = np.arange(total_steps)
    length = total_steps - warmup_steps
    if warmup_steps == 0:
        return _cosine(base, final, step / length)
    peak = warmup_steps + 1
    warmup = base * (step[: peak + 1] / warmup_steps)
    overshoot = base * peak / warmup_steps
    return np.concatenate([warmup, _cosine(overshoot, final, (step[peak + 1 :] - peak) / length)])


def warmup_cosine(base: float, total_steps: int, warmup_steps: int, final: float = 0.0) -> np.ndarray:
    """Linear warm-up that reaches `base` in its last step, then a cosine that reaches `final` in the last step of all.

    No step is wasted on rate 0 at the start: the first has base / warmup_steps, or `base` without a warm-up.

    Args:
        base: highest rate.
        total_steps: optimizer steps of the whole training; a single step uses `base`.
        warmup_steps: steps of warm-up, 0 for none.
        final: rate of the last step.

    Returns:
        (total_steps,) float64.

    Raises:
        ValueError: not 0 <= warmup_steps < total_steps.
    """
    _check_steps(total_steps, warmup_steps)
    warmup = base * (np.arange(1, warmup_steps + 1) / max(warmup_steps, 1))
    # The step that has `base` is the last of the warm-up, or the first of all.
    peak = max(warmup_steps - 1, 0)
    step = np.arange(warmup_steps, total_steps)
    return np.concatenate([warmup, _cosine(base, final, (step - peak) / max(total_steps - 1 - peak, 1))])
