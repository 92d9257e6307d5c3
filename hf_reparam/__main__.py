"""`python -m hf_reparam`: the command line."""

import sys

from hf_reparam.cli import main

sys.exit(main())
