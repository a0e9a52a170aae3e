"""GranViT's stage 2. `python scripts/stage2.py --help`; without arguments the paper's run, configs/stage2.yaml."""
import sys

from granvit.train import train_command

if __name__ == "__main__":
    sys.exit(train_command("stage2"))
