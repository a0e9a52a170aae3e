"""Builds region stores from public data. `python scripts/build_gran.py --help`."""
import sys

from granvit.data.gran.command import main

if __name__ == "__main__":
    sys.exit(main())
