"""`python -m gnnet.scenes DATASET ROOT`, see `gnnet.evaluation.inspect.command`."""

import sys

from gnnet.evaluation.inspect.command import main

if __name__ == "__main__":
    sys.exit(main())
