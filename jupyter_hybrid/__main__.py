"""``python -m jupyter_hybrid`` is ``jupyter hybrid``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
