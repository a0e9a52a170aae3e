"""The ablation command with the toy engine of tests/toy.py, for tests that start and kill it: `python toy_ablate.py GRID ...`.

Answers are scored at random: right with a probability of 0.3, or 0.7 for runs whose chain was trained with self-distillation. The
random numbers depend on the run's seed, the question and that probability.
TOY_PAUSE=SECONDS: every training step takes so much longer. TOY_EXCHANGE=DIRECTORY: where the ranks of a run exchange sums.
"""
import hashlib
import os
import sys
import time
from pathlib import Path

from granvit import evaluate, train
from granvit.ablation.command import main
from granvit.launch import detect_launch
from granvit.metrics import SCORES
from tests.toy import ToyEngine, ToyRanks

CONFIG = []


class Engine(ToyEngine):
    @staticmethod
    def join(device: str) -> ToyRanks:
        job = detect_launch()
        if job.world == 1:
            return ToyRanks()
        exchange = Path(os.environ["TOY_EXCHANGE"]) / job.key
        exchange.mkdir(exist_ok=True)
        return ToyRanks(job.rank, job.world, exchange)

    def __init__(self, config, vision, language, start, ranks=None):
        CONFIG[:] = [config]
        super().__init__(config, vision, language, start, ranks)

    def step(self, micro_batches, step_inputs):
        time.sleep(float(os.environ.get("TOY_PAUSE", "0")))
        return super().step(micro_batches, step_inputs)


def score(task, answer, reference, box) -> dict[str, float]:
    chance = 0.7 if CONFIG[0].distill.weight > 0 else 0.3
    digest = hashlib.sha256(f"{CONFIG[0].seed} {chance} {reference} {box}".encode()).digest()
    return dict.fromkeys(SCORES[task], float(int.from_bytes(digest[:6], "big") / 2**48 < chance))


if __name__ == "__main__":
    train.load_engine_class = lambda framework: Engine
    train._run_scheduler = lambda: None  # the process that msrun starts as scheduler
    evaluate.score = score
    sys.exit(main())
