"""Runs the demo: data, training, a table of results and pictures. `python scripts/demo.py --help`; `make demo` runs it."""
import sys

from granvit.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
