"""Make the demo's example files from the movie-review snippets of vaderSentiment's source archive.

    python benchmarks/demo/prepare.py ARCHIVE FOLDER

10,604 snippets with the mean of twenty people's ratings, -4 to 4 (Hutto and Gilbert, ICWSM 2014). Those with
|rating| > 0.5 are used, in an order drawn from a fixed seed: 1,000 are held out from both tasks, 6,000 train the
classifier, 480 the language model, which learns to write a review of the asked kind.
"""

import io
import json
import random
import sys
import tarfile
from pathlib import Path

INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
HELD_OUT, CLASSIFIER, WRITER, WRITER_HELD_OUT = 1000, 6000, 480, 150


def snippets(archive: Path) -> list[tuple[float, str]]:
    """Return (rating, text) of every snippet."""
    with tarfile.open(archive) as outer:
        inner = next(member for member in outer if member.name.endswith(INNER))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as files:
            text = files.extractfile(SNIPPETS).read().decode("utf-8", errors="replace")
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    return [(float(rating), snippet.strip()) for _, rating, snippet in rows]


def main(archive: Path, folder: Path) -> None:
    chosen = [(rating, text) for rating, text in snippets(archive) if abs(rating) > 0.5]
    random.Random(0).shuffle(chosen)
    rows = [("positive" if rating > 0 else "negative", text) for rating, text in chosen]
    held_out, train = rows[:HELD_OUT], rows[HELD_OUT : HELD_OUT + CLASSIFIER]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("classify_train", train), ("classify_test", held_out)):
        write(folder / f"{name}.jsonl", [{"text": text, "label": label} for label, text in part])
    for name, part in (("write_train", train[:WRITER]), ("write_test", held_out[:WRITER_HELD_OUT])):
        lines = [{"prompt": f"A {label} movie review:", "completion": f" {text}"} for label, text in part]
        write(folder / f"{name}.jsonl", lines)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
