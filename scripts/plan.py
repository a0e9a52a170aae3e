"""Predicts FLOPs, memory and days of a stage before it is started: `python scripts/plan.py --config configs/stage1.yaml`."""
import sys

from granvit.plan import main

if __name__ == "__main__":
    sys.exit(main())
