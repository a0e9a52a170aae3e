"""GranViT's stage 1. `python scripts/stage1.py --help`; without arguments the paper's run, configs/stage1.yaml."""
import sys

from granvit.train import train_command

if __name__ == "__main__":
    sys.exit(train_command("stage1"))
