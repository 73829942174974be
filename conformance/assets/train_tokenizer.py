"""Makes tokenizer.json from training_text.txt: byte-level BPE, MERGES merges.

Needed only to change the vocabulary; the build and the tests use the file that is checked in.
"""
import collections
import json
import pathlib
import re

MERGES = 1200
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# ASCII classes only: every regex engine agrees on them, and so does a scanner of a few lines.
PATTERN = r" ?[A-Za-z]+| ?[0-9]{1,3}| ?[^ \t\r\nA-Za-z0-9]+|[ \t\r\n]+"
HERE = pathlib.Path(__file__).parent


def byte_alphabet():
    """GPT-2's printable stand-ins for the 256 byte values."""
    plain = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    table, extra = {}, 0
    for byte in range(256):
        if byte in plain:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return table


def train(text):
    alphabet = byte_alphabet()
    words = collections.Counter(re.findall(PATTERN, text))
    split = {w: [alphabet[b] for b in w.encode()] for w in words}
    merges = []
    while len(merges) < MERGES:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(split[word], split[word][1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        for word in words:
            parts, i = [], 0
            while i < len(split[word]):
                if tuple(split[word][i : i + 2]) == best:
                    parts.append("".join(best))
                    i += 2
                else:
                    parts.append(split[word][i])
                    i += 1
            split[word] = parts
    return alphabet, merges


def main():
    alphabet, merges = train((HERE / "training_text.txt").read_text())
    vocab = {t: i for i, t in enumerate(SPECIALS)}
    for byte in range(256):
        vocab[alphabet[byte]] = len(vocab)
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    out = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, t in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": vocab, "merges": [list(m) for m in merges]},
    }
    (HERE / "tokenizer.json").write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n")


main()
