"""Converts checkpoints between layouts. `python parity/convert.py --help`."""
import sys

from granvit.checkpoint.convert import main

if __name__ == "__main__":
    sys.exit(main())
