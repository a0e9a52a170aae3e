"""Compares encoders on the regions of a store. `python scripts/probe.py --help`."""
import sys

from granvit.probe.command import main

if __name__ == "__main__":
    sys.exit(main())
