"""What is answered? Logits whose softmax are the method's probabilities; and is it to be trusted?"""

from torch import Tensor

from testtime.measures.confidence import confidence


def student(logits: Tensor) -> Tensor:
    """The adapted model's own logits."""
    return logits


def student_and_teacher(logits: Tensor, teacher: Tensor) -> Tensor:
    """The sum of both logits: their ensemble, as sure as both together."""
    return logits + teacher


def from_teacher(teacher: Tensor) -> Tensor:
    """The teacher's logits."""
    return teacher


def unsure(logits: Tensor) -> Tensor:
    """How likely a sample is of no known class: 1 - the probability of the answer, in [0, 1)."""
    return 1 - confidence(logits)
