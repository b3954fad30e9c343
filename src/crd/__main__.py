"""`python -m crd` is `crd`."""

import sys

from crd.cli import main

sys.exit(main())
