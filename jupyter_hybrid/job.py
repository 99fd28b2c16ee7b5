"""Gone: use :mod:`jupyter_hybrid.spec`."""

from .spec import *  # noqa: F403
from .spec import RESOURCE_ALIASES, _FINAL  # noqa: F401
