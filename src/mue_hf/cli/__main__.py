"""`python -m mue_hf.cli`, for launchers that take a module, such as `accelerate launch -m`."""

import sys

from . import main

sys.exit(main())
