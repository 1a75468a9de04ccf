"""`python -m cat_cluster.cli` is the command `cat-cluster`."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit; an interrupt while it is still being imported ends it in silence too."""
    try:
        from cat_cluster.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
