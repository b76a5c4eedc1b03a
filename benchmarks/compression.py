"""A text that the model cannot have read, compressed with it and with the usual compressors.

    python benchmarks/compression.py                        all parts, some minutes on one core
    python benchmarks/compression.py --parts encode,decode  these, of encode, decode and bound

The text is the first pages of this documentation as they are at the time; its SHA-256 is written down.
`encode` and `decode` make a real file and read it again; `bound` asks for the model's own bits on
a longer piece, whole passes at a time, which is quick and only for measuring. Writes
`benchmarks/compression.json`.
"""

import argparse
import bz2
import hashlib
import json
import lzma
import math
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from testtime.bench.machine import describe_machine
from testtime.decode.compression import WINDOW, compress, decompress
from testtime.decode.models import load_language_model
from testtime.decode.windows import read, start_token

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks/compression.json"
PAGES = ("getting-started", "how-to-choose", "streams", "benchmarks", "dependencies", "extending")
PARTS = ("encode", "decode", "bound")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma:270m")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--characters", type=int, default=2400, help="of the file")
    parser.add_argument("--longer", type=int, default=20_000, help="characters of `bound`")
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--work", default=Path(tempfile.gettempdir()) / "testtime-compression")
    args = parser.parse_args()
    whole = "\n".join((ROOT / f"docs/{page}.md").read_text("utf-8") for page in PAGES)
    text = whole[: args.characters]
    packed = Path(args.work) / "text.ttlz"
    packed.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_language_model(args.model)
    found = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    found |= {"model": args.model, "machine": describe_machine(torch.device("cpu"))}
    for part in args.parts.split(","):
        began = time.process_time()
        if part == "encode":
            made = compress(text.encode(), model, tokenizer, lanes=args.lanes)
            packed.write_bytes(made.data)
            found["file"] = {
                "lanes": args.lanes, "tokens": made.tokens, **usual(text),
                "testtime": made.bits_per_character, "bound": made.bound,
            }  # fmt: skip
        elif part == "decode":
            same = decompress(packed.read_bytes(), model, tokenizer) == text.encode()
            found["file"]["round trip"] = same
        else:
            longer = whole[: args.longer]
            found["longer"] = usual(longer) | {"bound": bound(longer, model, tokenizer)}
        found[f"processor seconds of {part}"] = round(time.process_time() - began, 1)
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n")


def usual(text: str) -> dict[str, Any]:
    """Bits per character of common compressors, and which text it was."""
    content, size = text.encode(), len(text)
    return {
        "characters": size,
        "sha256": hashlib.sha256(content).hexdigest(),
        "zlib -9": 8 * len(zlib.compress(content, 9)) / size,
        "bz2 -9": 8 * len(bz2.compress(content, 9)) / size,
        "xz -9": 8 * len(lzma.compress(content, preset=9)) / size,
    }


def bound(text: str, model: Any, tokenizer: Any) -> float:
    """Bits per character of the model, in windows that overlap by half as those of `compress` do."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    bits, at, half = 0.0, 0, WINDOW // 2
    while at < len(tokens):
        seen = tokens[max(at - half + 1, 0) : at]
        own = tokens[at : at + (WINDOW - len(seen) - 1)]
        ids, cache = [start_token(tokenizer), *seen, *own], None
        for start in range(0, len(ids) - 1, 64):
            part = torch.tensor([ids[start : min(start + 64, len(ids) - 1)]])
            logits, cache = read(model, part, cache, last=0)
            nats = logits[0].float().log_softmax(-1)
            for place, row in enumerate(nats, start + 1):
                if place > len(seen):
                    bits -= float(row[ids[place]]) / math.log(2)
        at += len(own)
    return bits / len(text)


if __name__ == "__main__":
    main()
