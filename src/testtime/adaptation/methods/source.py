"""No adaptation: the control that every comparison needs.

return f(x)
"""

from testtime._core.registry import register
from testtime.adaptation.recipe import Recipe


@register("method", paper="")
def source() -> Recipe:
    """The model as it is; the control that stands in every report.

    Use when: always, beside whatever else is tried: it says what adaptation gained.

    Not when: you want the model to adapt.

    Example:
        >>> source().learns
        False
    """
    return Recipe()
