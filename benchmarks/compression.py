"""Texts of several kinds, compressed with a language model and with the usual compressors.

    python benchmarks/compression.py                     all texts, some minutes each on one core
    python benchmarks/compression.py --texts code        one of them
    python benchmarks/compression.py --page              only the table in docs/decode-codes.md

    english    pages of this documentation, which the model cannot have read
    code       this library's own, the same
    languages  what mkdocs-material says in 40 languages of many scripts
    bytes      weights of an embedded model: nothing that a language model knows

Each text becomes a real file, which is read again; each half is written down when it is done, and the
same command goes on from there. Documentation and code are as they are at the time: their SHA-256 is written down.
"""

import argparse
import bz2
import hashlib
import json
import lzma
import re
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from between import write_between, write_json
from names import names_of
from testtime.bench.machine import describe_machine
from testtime.decode.compression import compress, decompress
from testtime.decode.models import load_language_model

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks/compression.json"
PAGE = ROOT / "docs/decode-codes.md"
PAGES = ("getting-started", "how-to-choose", "deploying", "measures", "monitors")
USUAL: dict[str, Callable[[bytes], bytes]] = {
    "zlib -9": lambda content: zlib.compress(content, 9),
    "bz2 -9": lambda content: bz2.compress(content, 9),
    "xz -9": lambda content: lzma.compress(content, preset=9),
}


def english() -> bytes:
    """12,000 characters."""
    return "\n".join((ROOT / f"docs/{page}.md").read_text("utf-8") for page in PAGES)[
        :12_000
    ].encode()


def code() -> bytes:
    """6,000 characters."""
    files = sorted((ROOT / "src/testtime/decode").glob("*.py"))
    return "".join(path.read_text("utf-8") for path in files)[:6_000].encode()


def languages() -> bytes:
    """Up to 100 characters of each language."""
    spec = find_spec("material")
    if spec is None or spec.origin is None:
        raise SystemExit("the text `languages` needs mkdocs-material: pip install mkdocs-material")
    files = sorted((Path(spec.origin).parent / "templates/partials/languages").glob("*.html"))
    texts = [" ".join(re.findall(r'": "(.*)"', path.read_text("utf-8"))) for path in files]
    others = [text[:100] for text in texts if not text.isascii()]
    return "\n".join(others[:40]).encode()


def weights() -> bytes:
    """1,000 bytes from the middle of a file."""
    file = ROOT / "src/testtime/bench/embedded/fashion_mnist_batch.safetensors"
    return file.read_bytes()[50_000:51_000]


TEXTS = {"english": english, "code": code, "languages": languages, "bytes": weights}


def there(content: bytes, model: Any, tokenizer: Any, packed: Path, lanes: int) -> dict[str, Any]:
    """Makes the file; sizes in bytes, bits per character, seconds."""
    begun = time.perf_counter()
    made = compress(content, model, tokenizer, lanes=lanes)
    packed.write_bytes(made.data)
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "characters": made.characters, "bytes": len(content), "tokens": made.tokens, "lanes": lanes,
        **{name: len(run(content)) for name, run in USUAL.items()}, "testtime": len(made.data),
        "bits per character": made.bits_per_character, "bound": made.bound,
        "seconds there": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def back(sha256: str, model: Any, tokenizer: Any, packed: Path) -> dict[str, Any]:
    """Reads the file again: seconds, and whether the content came back."""
    begun = time.perf_counter()
    content = decompress(packed.read_bytes(), model, tokenizer)
    seconds = round(time.perf_counter() - begun, 1)
    return {"seconds back": seconds, "came back": hashlib.sha256(content).hexdigest() == sha256}


def page(path: Path, found: dict[str, Any]) -> None:
    """Writes the table between the marks of a page."""
    columns = ("bytes", *USUAL, "testtime")
    lines = [f"| | {' | '.join(columns)} | bits per character | of `xz -9` |"]
    lines.append(f"|---|{'--:|' * (len(columns) + 2)}")
    for name, row in found["texts"].items():
        sizes = " | ".join(f"{row[column]:,}" for column in columns)
        rival = 8 * row["xz -9"] / row["characters"]
        lines.append(f"| {name} | {sizes} | {row['bits per character']:.2f} | {rival:.2f} |")
    write_between(path, "compression", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="gemma:270m")
    parser.add_argument("--texts", type=names_of(TEXTS), default=",".join(TEXTS))
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--out", type=Path, default=NUMBERS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "testtime-codes")
    parser.add_argument("--again", action="store_true", help="also what is written down already")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the table")
    asked = parser.parse_args()
    if asked.page:
        page(PAGE, json.loads(asked.out.read_text("utf-8")))
        return
    about = {
        "model": asked.model, "machine": describe_machine(torch.device("cpu")),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    held = json.loads(asked.out.read_text("utf-8")) if asked.out.exists() else {}
    if any(held.get(name) != value for name, value in about.items()) or "texts" not in held:
        held = {**about, "texts": {}}
    asked.work.mkdir(parents=True, exist_ok=True)
    texts = held["texts"]
    for name in asked.texts if asked.again else ():
        texts.pop(name, None)
    wanted = [name for name in asked.texts if "came back" not in texts.get(name, {})]
    pair = load_language_model(asked.model) if wanted else (None, None)
    for name in wanted:
        packed = asked.work / f"{name}.ttlz"
        if name not in texts or not packed.exists():
            texts[name] = there(TEXTS[name](), *pair, packed, asked.lanes)
            save(asked.out, held)
        texts[name] |= back(texts[name]["sha256"], *pair, packed)
        save(asked.out, held)
        print(name, texts[name], flush=True)


def save(path: Path, held: dict[str, Any]) -> None:
    """Writes the numbers down, texts in their order."""
    texts = {name: held["texts"][name] for name in TEXTS if name in held["texts"]}
    write_json(path, {**held, "texts": texts})


if __name__ == "__main__":
    main()
