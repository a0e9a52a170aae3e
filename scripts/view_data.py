"""Draws records of a store with their boxes, questions and answers: `python scripts/view_data.py STORE --random 20`."""
import sys

from granvit.data.view import main

if __name__ == "__main__":
    sys.exit(main())
