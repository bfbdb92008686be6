"""Where torch.compile can be tested."""

from __future__ import annotations

import sys

import pytest

# There compiled code runs again although what it was made for has changed: after model.eval(), too.
needs_a_compiler = pytest.mark.skipif(
    sys.version_info[:3] == (3, 13, 0), reason="torch.compile is wrong under Python 3.13.0"
)
