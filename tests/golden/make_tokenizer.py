"""Make tokenizer.json: token ids by transformers' own GPT-2 tokenizer, for texts that are hard to split.

Run with a folder that holds OpenAI's encoder.json and vocab.bpe:

    python tests/golden/make_tokenizer.py FOLDER

Also prints the digest of the canonical vocabulary that tests/test_tokenizer.py holds.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

TEXTS = [
    "",
    "Hello world",
    " Hello world",
    "hello  world   again",
    "trailing spaces   ",
    "\n\n\n",
    "line\r\nline\ttab\x0b\x0c\x1c\x1f\x85end",
    " \u00a0\u2003\u3000 \u200b\ufeff x",
    "It's we'll they've I'd I'm you're IT'S 'sample",
    "3.14159 and 1,000,000 and ½ ² ٣ 三",
    "café cafe\u0301 naïve Ångström Å",
    "日本語のテキスト。中文字符，한국어",
    "עברית العربية ‮right-to-left",
    "😀 👨‍👩‍👧‍👦 🇩🇪 ❤️",
    "Z̷̢̛a̸l̶g̴o̵",
    "\x00\x01\x7f control",
    "<|endoftext|>",
    "before<|endoftext|>after",
    "def f(x):\n    return x ** 2  # square\n",
    "!!!???...---===***///\\\\\\",
    "snake_case camelCase SCREAMING_CASE",
    "ǅ ʰ ः ೕ Ⅷ ⅷ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛",
    "a" * 200,
    " " * 100 + "x",
    "approximately , one - third of patients with symptomatic vte manifests pe .\nboth dvt",
]


def main(folder: Path) -> None:
    import transformers

    vocabulary = json.loads((folder / "encoder.json").read_text("utf-8"))
    lines = (folder / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    merges: Any = [tuple(line.split(" ")) for line in lines]
    tokenizer = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)
    plain = []
    for text in TEXTS:
        # transformers reads "<|endoftext|>" as the special token; by its parts it is plain text.
        text_ids = tokenizer.backend_tokenizer.model.tokenize
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        plain.append([token.id for piece, _ in pieces for token in text_ids(piece)])
    special = [tokenizer.encode(text) for text in TEXTS]
    target = Path(__file__).with_name("tokenizer.json")
    rows = [
        json.dumps({"text": text, "ids": ids, "ids_with_special": with_special})
        for text, ids, with_special in zip(TEXTS, plain, special, strict=True)
    ]
    target.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    canonical = json.dumps(vocabulary, sort_keys=True, separators=(",", ":"))
    print(hashlib.sha256(canonical.encode()).hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
