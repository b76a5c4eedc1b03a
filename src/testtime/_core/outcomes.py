"""What became of a step: a hard stream is a result, not an error."""

from enum import StrEnum


class Outcome(StrEnum):
    """How a step ended, as a sentence."""

    ANSWERED = "answered; the method learns nothing from a batch"
    ADAPTED = "adapted"
    STORED = "stored in memory; no update was due"
    NOTHING_RELIABLE = "no sample was fit to teach; nothing changed"
    LIKE_SOURCE = "answered by the source model, whose data these look like"
    NOT_DUE = "answered; no update was due"
    NON_FINITE = "loss or gradient was not finite; nothing changed"
    GUARDED = "answered by the source model; the guard does not trust what was learnt"
    ROLLED_BACK = "the guard lost its trust: an earlier state was restored, and the source answered"
    UNSURE = "adapted; the source model answered, since the guard does not know yet"
    TRUSTED = "answered; the guard trusts what was learnt again"
    RECOVERED = "the loss had collapsed; the source was restored"
