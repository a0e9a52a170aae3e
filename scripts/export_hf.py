"""A run for transformers, as a vision model or as LLaVA. `python scripts/export_hf.py --help`."""
import signal
import sys

from parity.export import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that removes what is half written
    sys.exit(main())
