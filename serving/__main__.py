"""`python -m serving` is `hkv-jax`."""

import sys

from serving.cli import main

sys.exit(main())
