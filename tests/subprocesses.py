"""What processes that tests start need to know."""

from __future__ import annotations

import os
from pathlib import Path

import crd

# The package under test, which need not be the installed one, and the modules beside the tests.
IMPORTED_FROM = os.pathsep.join([str(Path(crd.__file__).parents[1]), str(Path(__file__).parent)])
