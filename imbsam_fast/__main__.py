"""`python -m imbsam_fast` is `imbsam-fast`."""

import sys

from .cli import main

sys.exit(main())
