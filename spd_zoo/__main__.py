"""`python -m spd_zoo` is `spd-zoo`."""

import sys

from spd_zoo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
