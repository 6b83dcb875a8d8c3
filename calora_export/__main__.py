"""`python -m calora_export` is the same as `calora-export`."""

import sys

from calora_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
