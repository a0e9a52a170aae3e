"""Runs a grid of ablations. `python scripts/ablate.py --help`; docs/ablations.md describes grid files."""
import sys

from granvit.ablation.command import main

if __name__ == "__main__":
    sys.exit(main())
