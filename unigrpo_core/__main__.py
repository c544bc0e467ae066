"""``python -m unigrpo_core`` is the command ``unigrpo``."""

import sys

from unigrpo_core.cli import main

sys.exit(main())
