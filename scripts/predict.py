"""Asks a trained run about a picture: `python scripts/predict.py --run RUN IMAGE --box x1,y1,x2,y2 | --text "..."`."""
import sys

from granvit.predict import predict_command

if __name__ == "__main__":
    sys.exit(predict_command())
