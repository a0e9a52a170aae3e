"""GranViT's supervised fine-tuning. `python scripts/sft.py --help`; without arguments configs/sft.yaml."""
import sys

from granvit.train import train_command

if __name__ == "__main__":
    sys.exit(train_command("sft"))
