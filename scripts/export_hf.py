"""Exports a run for transformers, as a vision model or as LLaVA. `python scripts/export_hf.py --help`."""
import sys

from granvit.checkpoint.export import main

if __name__ == "__main__":
    sys.exit(main())
