"""No adaptation: the control that every comparison needs.

return f(x)
"""

from testtime._core.registry import register
from testtime.adaptation.recipe import Recipe


@register("method", paper="")
def source() -> Recipe:
    """The model as it is; the control that stands in every report.

    Example:
        >>> source().learns
        False
    """
    return Recipe()
