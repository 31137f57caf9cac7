"""`python -m hf_dpssl.cli`, as `accelerate launch -m` wants it."""

import sys

from .commands import main

sys.exit(main())
