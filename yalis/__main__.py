"""``python -m yalis``: the same as the ``yalis`` command."""

import sys

from yalis.cli.main import main

sys.exit(main())
