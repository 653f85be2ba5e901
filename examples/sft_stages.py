"""The SFT stage of a vision-language model, from raw rows to a trained model, in about a minute on two CPU cores.

    python examples/sft_stages.py OUTPUT

Rewrite, filter, mix, then three stages of training (`align`, `single_image`, `one_vision`) on pictures that are cut
into tiles, and a few questions at the end; each step is the command that it prints. Rewriting and filtering ask a
large model. A small server stands in for it here, which knows sums and errs now and then, so that there is something
to leave out: put the address of your own in its place.
"""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_builders.shards import read_rows, write_rows
from mpo import digits

STEPS = {"vision": 100, "align": 20, "single_image": 60, "one_vision": 20}
TRAINING = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "logging_steps": 5}
TRAINING |= {"per_device_train_batch_size": 16, "learning_rate": 1e-3, "save_strategy": "no", "max_length": None}


def main(output: str) -> None:
    """Runs everything; what is done already is not done again."""
    folder = Path(output)
    write_data(folder)
    teacher = Server(("127.0.0.1", 0), Teacher)
    threading.Thread(target=teacher.serve_forever, daemon=True).start()
    model = {"model": "teacher", "server": [f"http://127.0.0.1:{teacher.server_port}/v1"], "image_root": output}
    sources = {
        "readings": {"path": f"{output}/readings.jsonl", "category": "OCR", "group": "A"},  # kept
        "sums": {"path": f"{output}/sums.jsonl", "category": "Code&Math", "group": "B"},  # rewritten
        "captions": {"path": f"{output}/captions.jsonl", "category": "Caption", "group": "B"},
        "noise": {"path": f"{output}/noise.jsonl", "category": "General", "group": "C"},  # dropped
    }
    mpo("rewrite", **model, sources=sources, screen=True, screen_rows=20, output=f"{output}/sheets", min_side=32)
    mpo("rewrite", **model, sources=sources, output=f"{output}/rewrite", min_side=32)
    mpo("filter", **model, conversations=f"{output}/rewrite/rewritten", output=f"{output}/filtered", min_side=32)
    both = {
        "rewritten": {"path": f"{output}/filtered", "rewritten": True},
        "original": {"path": f"{output}/rewrite/original", "rewritten": False},
    }
    mpo("mix", mixture="mammoth_vl", sources=both, output=f"{output}/mixed")
    write_base(folder)
    mpo("sft", model_name_or_path=f"{output}/base", image_root=output, output_dir=f"{output}/sft", **stages(output))
    models = [f"{stage}={output}/sft/{stage}" for stage in ("align", "one_vision")]
    asked = {"questions": f"{output}/questions.jsonl", "image_root": output, "output": f"{output}/evaluation"}
    mpo("eval", models=models, **asked, prompts=["plain"], max_new_tokens=64)


def mpo(verb: str, **settings: Any) -> None:
    """Runs a verb of the command line, and stops where it fails."""
    words = [(f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in settings.items()]
    command = ["mpo", verb, *(word for pair in words for word in pair)]
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


def stages(output: str) -> dict[str, Any]:
    """The settings of `mpo sft`: what all stages share, and what each has of its own."""
    tiles = {"rule": "mm1_5", "n_min": 4, "n_max": 4, "side": digits.SIZE, "indicator": "index"}
    align = {"name": "align", "data": [f"{output}/rewrite/original"], "train": ["projector"]}
    single = {"name": "single_image", "data": [f"{output}/mixed"], "part_learning_rates": {"vision": 2e-4}}
    single |= {"packing": True, "loss_reduction": "square", "tiling": tiles}
    both = {**single, "name": "one_vision", "data": [f"{output}/mixed", f"{output}/pairs.jsonl"]}
    return {**TRAINING, "stages": [{**stage, "max_steps": STEPS[stage["name"]]} for stage in (align, single, both)]}


def write_data(folder: Path) -> None:
    """Writes pictures of four handwritten digits, rows about them with bare answers, and questions."""
    if (folder / "questions.jsonl").exists():
        return
    scans, rng = digits.split_scans(seed=0)["sft"], np.random.default_rng(0)
    chosen = rng.integers(0, len(scans.labels), (700, 4))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(digits.draw_pictures(scans.pixels[chosen], rng)):
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
    seen = scans.labels[chosen].tolist()

    def rows(name: str, places: range, question: str, answer: str) -> None:
        found = []
        for place in places:
            a, b, c, d = seen[place]
            said = answer.format(a=a, b=b, c=c, d=d, sum=a + b + c + d)
            found.append({"id": f"{name}-{place}", "images": [f"images/{place}.png"], "source": name})
            found[-1]["prompt"] = [{"role": "user", "content": question}]
            found[-1]["completion"] = [{"role": "assistant", "content": said}]
        write_rows(folder / f"{name}.jsonl", found)

    rows("readings", range(200), "Read the digits.", "{a}, {b}, {c}, {d}.")
    rows("sums", range(200, 500), "What is the sum of the digits?", "{a} + {b} + {c} + {d} = {sum}")
    rows("captions", range(500, 600), "Describe the picture.", "Four digits by hand: {a}, {b}, {c} and {d}.")
    rows("noise", range(600, 620), "?", "click here")
    pairs = []
    for place in range(620, 700, 2):
        asked = "Which picture has the larger sum, the first or the second?"
        sums = sum(seen[place]), sum(seen[place + 1])
        said = f"{sums[0]} and {sums[1]}: the {'first' if sums[0] >= sums[1] else 'second'}."
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        turns += [{"role": "user", "content": "Read the first."}, {"role": "assistant", "content": f"{seen[place]}"}]
        images = [f"images/{place}.png", f"images/{place + 1}.png"]
        pairs.append({"id": f"pair-{place}", "images": images, "messages": turns})
    write_rows(folder / "pairs.jsonl", pairs)
    path, held_out = folder / "questions.jsonl", digits.split_scans(0)["development"]
    digits.write_questions(path, held_out, 150, prefix="development", seed=1)
    write_rows(path, [row for row in read_rows(path) if row["source"] == "sum"])


def write_base(folder: Path) -> None:
    """Writes the model to start from: a language model that knows nothing, and a tower that has seen digits."""
    if (folder / "base" / "config.json").exists():
        return
    rows = [row for path in sorted((folder / "mixed").glob("*.jsonl")) for row in read_rows(path)]
    texts = (message["content"] for row in rows for message in row["completion"])
    scans = digits.split_scans(0)["sft"]
    digits.write_model(folder / "base", texts, scans, seed=0, vision_seed=0, vision_steps=STEPS["vision"])


class Server(ThreadingHTTPServer):
    """Takes as many requests at a time as a client sends."""

    request_queue_size = 128


class Teacher(BaseHTTPRequestHandler):
    """Stands in for a large model behind an OpenAI-compatible server."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Says which models there are."""
        self.reply({"data": [{"id": "teacher"}]})

    def do_POST(self) -> None:
        """Answers a chat."""
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        said = judged(text) if "Yes or No" in text else rewritten(text)
        self.reply({"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}]})

    def reply(self, answer: dict[str, Any]) -> None:
        """Sends JSON."""
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def rewritten(text: str) -> str:
    """A row with a rationale; where the first digit is 9, 8 or 7 it is flawed, each time in another way."""
    found = [int(digit) for digit in re.findall(r"\d", re.search(r"(?:hand: .*|\d \+ .*)", text)[0])[:4]]
    steps = digits.ask("sum", found, 0)[1]
    if "hand:" in text:
        return f"<Instruction: Which digits are there, and what is their sum?>\n<Response: {steps}>"
    flaws = {
        9: f"<response: {steps}",  # not closed
        8: f"<response: {steps}1>",  # another answer
        7: f"<response: {steps.replace(f'second is {found[1]}', f'second is {(found[1] + 1) % 10}')}>",  # a wrong step
    }
    return flaws.get(found[0], f"<response: {steps}>")


def judged(text: str) -> str:
    """Whether each sum on the way follows from the one before."""
    read = [int(digit) for digit in re.findall(r"(?:first|second|third|fourth) is (\d)", text)]
    sums = [int(number) for number in re.findall(r"sum (\d+)", text)]
    return "Yes" if [sum(read[: end + 2]) for end in range(len(sums))] == sums else "No"


if __name__ == "__main__":
    main(*sys.argv[1:])
