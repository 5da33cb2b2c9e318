"""`python -m dit_fast`: the command line, where its script is not on the path."""

import sys

from dit_fast.cli import main

sys.exit(main())
