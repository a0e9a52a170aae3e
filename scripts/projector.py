"""GranViT's projector stage. `python scripts/projector.py --help`; without arguments configs/projector.yaml."""
import sys

from granvit.train import train_command

if __name__ == "__main__":
    sys.exit(train_command("projector"))
