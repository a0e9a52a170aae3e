"""GranViT's continued pretraining. `python scripts/continued.py --help`; without arguments configs/continued.yaml."""
import sys

from granvit.train import train_command

if __name__ == "__main__":
    sys.exit(train_command("continued"))
