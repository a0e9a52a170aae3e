"""The demo: trains a tiny GranViT on its own data and writes a report. `make demo` runs it; by hand it is `scripts/demo.py` or
`granvit-demo`.

Parts; finished ones are not repeated, an interrupted one is resumed:
  data            training and held-out scenes on photographs, and the start weights, which are shipped (granvit/demo/pair)
  stage1          encoder and projector, decoder frozen: Bbox2Caption, self-distillation; two ranks
  stage2          projector and decoder, encoder frozen: Caption2Bbox and a little Bbox2Caption         } side by side
  stage1_mixed    continues stage 1 with Caption2Bbox mixed in (the paper's Fig. 4), which a frozen     }
                  decoder cannot learn                                                                  }
  guesser         trains the decoder without the image: the baseline                                    }
  report          report.html and report.md with tables and pictures, first after stage 1
"""
import argparse
import shutil
import signal
import sys
from pathlib import Path

from granvit.data.batch import Packer
from granvit.data.store_writer import write_store
from granvit.demo.pair import SHIPPED, copy_pair, read_sums
from granvit.demo.parts import Lanes, Parts, Plan
from granvit.demo.pretrain import SEED, Pretraining
from granvit.demo.scenes import scenes, scenes_version
from granvit.demo.seeds import compare_seeds
from granvit.demo.text_maps import compose_text
from granvit.exit_status import exit_status
from granvit.launch import RunLock, detect_launch
from granvit.logs import to_console
from granvit.train import train_command

SCENES = {"train": 8_000, "heldout": 200}
DATA: Lanes = (("data",),)
STAGE1: Lanes = (("stage1",),)
OTHERS: Lanes = (("stage2",), ("stage1_mixed", "guesser"))


class Demo(Parts):
    """Data, start weights and the four runs in one directory."""

    plan = Plan(
        root=Path("runs/demo"),
        after={"data": None, "stage1": "data", "stage2": "stage1", "stage1_mixed": "stage1", "guesser": "data"},
        seconds={"data": 15, "stage1": 125, "stage2": 400, "stage1_mixed": 100, "guesser": 115},
        ranks={"stage1": 2},
    )

    def contents(self, part: str) -> str | None:
        return repr((SCENES, self.seed, scenes_version(), read_sums(SHIPPED))) if part == "data" else None

    def make(self, part: str) -> None:
        if part != "data":
            return
        copy_pair(self.root / "pretrained")
        for split, count in SCENES.items():
            out = self.root / "data" / split
            shutil.rmtree(out, ignore_errors=True)
            print(f"{split}: {count} scenes into {out}", flush=True)
            write_store(scenes(split, count, self.seed), out)

    def report(self) -> Path:
        """Writes the report about the parts that are finished."""
        from granvit.demo.report import write_report  # imported here: a training run does not need matplotlib

        return write_report(self.root, self.framework, self.seconds)


def main() -> int:
    if sys.argv[1:2] == ["rank"]:  # this process is one rank of a part's run
        part = sys.argv[2]
        compose = compose_text if part == "pretrain_text" else Packer.row
        stage = "stage1" if part == "stage1_mixed" else part
        return train_command(stage, sys.argv[3:], compose, f"{sys.argv[0]} rank {part}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all",
                        choices=("all", "prepare", "report", "compare", "pretrain"),
                        help="all (default); prepare: data and start weights; report: write the report again; compare: mean "
                             "and spread over the finished demos of --seeds; pretrain: make the start weights from nothing, "
                             "which takes hours")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="for compare (default: 0 1 2)")
    parser.add_argument("--seed", type=int, help=f"seed of scenes, weights and data order (default: 0; pretrain: {SEED})")
    parser.add_argument("--framework", choices=("mindspore", "torch"), default="mindspore", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="directory (default: runs/demo, runs/demo-SEED for other seeds, "
                                                 "runs/demo-pretrain for pretrain)")  # fmt: skip
    options = parser.parse_args()
    to_console(0)
    return exit_status(lambda: _run(options), [])


def _root(plan: Plan, seed: int, usual: int) -> Path:
    """The directory of a seed, if none is named."""
    return plan.root if seed == usual else Path(f"{plan.root}-{seed}")


def _run(options: argparse.Namespace) -> None:
    if options.what == "compare":
        print(compare_seeds({seed: _root(Demo.plan, seed, 0) for seed in options.seeds}))
        return
    kind: type[Parts] = Pretraining if options.what == "pretrain" else Demo
    usual = SEED if kind is Pretraining else 0
    seed = usual if options.seed is None else options.seed
    root = options.out or _root(kind.plan, seed, usual)
    lock = RunLock(root, detect_launch())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: runs save a checkpoint and end
    if kind is Pretraining:
        Pretraining(root, seed, options.framework).run([[list(Pretraining.plan.after)]])
        lock.release()
        return
    demo = Demo(root, seed, options.framework)
    if options.what == "prepare":
        demo.run([DATA])
    elif options.what == "all":
        demo.run([DATA, STAGE1], after=[OTHERS])
        print(f"== first pictures: {demo.report().with_suffix('.html')}", flush=True)
        demo.run([OTHERS])
    if options.what in ("all", "report"):
        path = demo.report()
        print(path.read_text().split("\n## ", 1)[0])
        print(f"{path}, {path.with_suffix('.html')} and their pictures were written")
    lock.release()


if __name__ == "__main__":
    sys.exit(main())
