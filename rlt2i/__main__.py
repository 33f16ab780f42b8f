"""`python -m rlt2i`, and what launchers start: `accelerate launch -m rlt2i train RECIPE`."""

import sys

from rlt2i.cli import main

sys.exit(main())
