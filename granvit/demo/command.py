"""The demo: makes its own data, trains a tiny GranViT and writes a table and pictures. `make demo` runs it; by hand it is
`scripts/demo.py` or `granvit-demo`.

Parts, in this order. Finished parts are not repeated, an interrupted part is resumed:
  data            training and held-out scenes on photographs, and a tokenizer trained on their texts
  pretrain_text   trains the small decoder on text alone                               } the pretrained pair
  pretrain_image  trains the small encoder on whole images and global captions         } (granvit/demo/pretrained.py)
  stage1          encoder and projector, decoder frozen: Bbox2Caption, self-distillation
  stage1_mixed    continues stage 1 with Caption2Bbox mixed in (the paper's Fig. 4), which a frozen decoder cannot learn
  guesser         trains the decoder without the image: the baseline
  stage2          projector and decoder, encoder frozen: Caption2Bbox and a little Bbox2Caption
  report          report.md with the table and pictures
"""
import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from granvit.config import CONFIGS, RunConfig, dump_config, load_config, resolve_models
from granvit.data import prompts
from granvit.data.batch import Packer
from granvit.data.chat import SYSTEM, train_tokenizer
from granvit.data.records import ImageRecord
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from granvit.demo.pretrained import GROUND, WHERE, compose_text, place, publish_language, publish_vision
from granvit.demo.scenes import scenes
from granvit.train import train_command

ROOT = Path("runs/demo")  # the root of all paths in configs/demo
SCENES = {"train": 12_000, "heldout": 200}
TOKENIZER_SCENES = 1_000
# Phrases that become single tokens. A question then has 30 tokens instead of 55, which halves the demo's time.
PHRASES = (
    prompts.BBOX2CAPTION.partition("{box}")[0] + "[0.",
    "]" + prompts.BBOX2CAPTION.partition("{box}")[2],
    prompts.CAPTION2BBOX.partition(" {caption}")[0],
    prompts.GLOBAL,
    "[0.",
    ", 0.",
    WHERE,
    "rows ",
    " to ",
    " columns ",
)
# Seconds of each part on the 2-core machine of docs/demo.md, to estimate the remaining time.
PARTS = {"data": 21, "pretrain_text": 270, "pretrain_image": 72, "stage1": 174, "stage1_mixed": 86, "guesser": 143,
         "stage2": 482, "report": 3}  # fmt: skip
PREPARE = ("data", "pretrain_text", "pretrain_image")
RUNS = ("pretrain_text", "pretrain_image", "stage1", "stage1_mixed", "guesser", "stage2")
STAGES = {"stage1_mixed": "stage1"}  # part -> stage, where the names differ


class Demo:
    """One demo in one directory: the configurations of its parts, and which parts are finished."""

    def __init__(self, root: Path, seed: int, framework: str):
        self.root, self.seed, self.framework = root, seed, framework
        self.finished_path = root / "parts.json"
        self.finished: dict[str, dict] = json.loads(self.finished_path.read_text()) if self.finished_path.exists() else {}

    def overrides(self, part: str) -> list[str]:
        """`key=value` overrides that put this demo's directory and seed into the part's configuration."""
        config = load_config(CONFIGS / "demo" / f"{part}.yaml")
        moved = lambda path: str(self.root / Path(path).relative_to(ROOT))  # noqa: E731
        found = [f"seed={self.seed}", f"output={moved(config.output)}"]
        found += [f"data.sources=[{{path: {moved(config.data.sources[0].path)}}}]"]
        for key in ("weights_vision", "weights_language", "tokenizer", "init_from"):
            if key in config.model.model_fields_set:
                found.append(f"model.{key}={moved(getattr(config.model, key))}")
        return found if config.eval.source is None else [*found, f"eval.source={moved(config.eval.source)}"]

    def config(self, part: str) -> RunConfig:
        return load_config(CONFIGS / "demo" / f"{part}.yaml", self.overrides(part))

    def key(self, part: str) -> str:
        """A hash of all that the part's result depends on: its configuration and the part before it."""
        names = list(PARTS)
        before = self.key(names[names.index(part) - 1]) if part != "data" else ""
        contents = dump_config(self.config(part)) if part in RUNS else repr((SCENES, TOKENIZER_SCENES, self.seed))
        return hashlib.sha256(f"{before}\0{self.framework if part in RUNS else ''}\0{contents}".encode()).hexdigest()[:16]

    def run(self, parts: list[str]) -> None:
        """Runs the parts that are not finished."""
        for number, part in enumerate(parts):
            if part != "report" and self.finished.get(part, {}).get("key") == self.key(part):
                print(f"== {part}: already finished, in {self.finished[part]['seconds']:.0f} s", flush=True)
                continue
            unfinished = [p for p in parts[number:] if p == part or self.finished.get(p, {}).get("key") != self.key(p)]
            minutes = sum(PARTS[p] for p in unfinished) / 60
            print(f"== {part} ({number + 1} of {len(parts)}); about {minutes:.0f} min left on 2 cores", flush=True)
            start = time.monotonic()
            self._make(part)
            seconds = time.monotonic() - start
            print(f"== {part}: {seconds:.0f} s", flush=True)
            if part != "report":
                self.finished[part] = {"key": self.key(part), "seconds": seconds}
                self.finished_path.write_text(json.dumps(self.finished, indent=1))

    def _make(self, part: str) -> None:
        if part == "data":
            self._make_data()
        elif part == "report":
            from granvit.demo.report import write_report  # imported here: a training run does not need matplotlib

            seconds = {name: self.finished[name]["seconds"] for name in PARTS if name in self.finished}
            path = write_report(self.root, self.framework, seconds)
            print(path.read_text().split("## Caption2Bbox", 1)[0])
            print(f"{path} and its pictures were written")
        else:
            self._train(part)
            vision, language = resolve_models(self.config(part))
            if part == "pretrain_text":
                publish_language(self.root / part, language, self.root / "tokenizer.json", self.root / "pretrained" / "language")
            elif part == "pretrain_image":
                publish_vision(self.root / part, vision, self.root / "pretrained" / "vision")

    def _make_data(self) -> None:
        for split, count in SCENES.items():
            out = self.root / "data" / split
            shutil.rmtree(out, ignore_errors=True)
            print(f"{split}: {count} scenes into {out}", flush=True)
            write_store(scenes(split, count, self.seed), out)
        store, language = Store(self.root / "data" / "train"), resolve_models(self.config("stage1"))[1]
        records = [record for record in map(store.record, range(TOKENIZER_SCENES)) if isinstance(record, ImageRecord)]
        texts = [text for record in records for text in _texts(record)]
        train_tokenizer(texts, language.vocab, language.chat, PHRASES).save(str(self.root / "tokenizer.json"))

    def _train(self, part: str) -> None:
        """Trains the part with two ranks under the framework's launcher; `SystemExit` if that fails."""
        with socket.socket() as probe:  # finds a free port
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        bin_directory = Path(sys.executable).parent
        if self.framework == "mindspore":
            launcher = [str(bin_directory / "msrun"), "--worker_num", "2", "--local_worker_num", "2", "--master_port", port,
                        "--bind_core", "True", "--join", "True", "--log_dir", str(self.root / part / "msrun")]  # fmt: skip
        else:
            launcher = [str(bin_directory / "torchrun"), "--nproc_per_node", "2", "--master_port", port]
        script = [Path(sys.argv[0]).resolve(), "rank", part]  # the file that this process was started with
        config = ["--config", CONFIGS / "demo" / f"{part}.yaml", "--framework", self.framework, *self.overrides(part)]
        command = [str(word) for word in (*launcher, *script, *config)]
        print(" ".join(command), flush=True)
        # OMP_NUM_THREADS: two ranks share the cores. GLOG_v: MindSpore's workers log hundreds of warnings while they connect.
        # MS_RETRY_INTERVAL: their end takes 2 s instead of 7 to 10. PATH: msrun starts the first `python` in it.
        search = f"{bin_directory}{os.pathsep}{os.environ['PATH']}"
        defaults = {"OMP_NUM_THREADS": "1", "GLOG_v": "3", "MS_RETRY_INTERVAL_LOWER": "0", "MS_RETRY_INTERVAL_UPPER": "1"}
        environment = {**defaults, **os.environ, "PATH": search}
        child = subprocess.Popen(command, env=environment)
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
        if status:
            raise SystemExit(f"{part} failed (exit status {status}); see the lines above and {self.root / part / 'log'}")


def _texts(record: ImageRecord) -> list[str]:
    """All texts of the questions and answers about a scene, for the training of the tokenizer."""
    assert record.global_caption is not None, record.id
    found = [f"system\n{SYSTEM}", "user\n", "assistant\n", GROUND, place(0, 1, 2, 3), prompts.GLOBAL, record.global_caption]
    for region in record.regions:
        found.append(WHERE + region.caption)
        for task in ("bbox2caption", "caption2bbox"):
            found.append(prompts.question_text(task, region.box, region.caption))
            found.append(prompts.answer_text(task, region.box, region.caption))
    return found


def main() -> int:
    if sys.argv[1:2] == ["rank"]:  # this process is one rank of a part's run
        part = sys.argv[2]
        compose = compose_text if part == "pretrain_text" else Packer.row
        return train_command(STAGES.get(part, part), sys.argv[3:], compose, f"{sys.argv[0]} rank {part}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "prepare", "report"), default="all",
                        help="all (default); prepare: data and the pretrained pair; report: write the report again")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and data order (default: 0)")
    parser.add_argument("--framework", choices=("mindspore", "torch"), default="mindspore", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="directory (default: runs/demo, or runs/demo-SEED for other seeds than 0)")
    options = parser.parse_args()
    root = options.out or (ROOT if options.seed == 0 else Path(f"{ROOT}-{options.seed}"))
    root.mkdir(parents=True, exist_ok=True)
    parts = {"all": list(PARTS), "prepare": list(PREPARE), "report": ["report"]}[options.what]
    Demo(root, options.seed, options.framework).run(parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
