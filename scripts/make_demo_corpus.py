"""Makes the corpus of the demo model: sampled stories and two public-domain books, as documents ready for `puna train`.

    python scripts/make_demo_corpus.py --teacher STORIES_MODEL --text FOLDER --out FOLDER

The teacher is the 260-thousand-parameter story model of Andrej Karpathy's tinyllamas in Hugging Face layout; the folder
of texts has grimm.txt and alice.txt. Sampling takes a core less than a minute for the 256 stories of a batch, and
writes a file per batch, so a run that was stopped goes on where it was. See docs/demo_model.md for what came out.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from puna.engine.tokenizer import Tokenizer
from puna.models import load_model

END = "<|endoftext|>"
BATCH = 256
# The first tokens decide who and what a story is about: drawn as the model has them. The rest is drawn more carefully,
# since the teacher's unlikely words are mostly mistakes.
OPENING, STORY = 24, 460
OPENING_TEMPERATURE, STORY_TEMPERATURE, TOP_P = 1.0, 0.6, 0.95
HELD_OUT_EVERY = 50  # of the stories; of the books' passages every 20th
RAREST_WORD = 8  # a story with a word that all stories together have less often is probably misspelt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=44, help=f"of {BATCH} stories each")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    batches = [(index, options.teacher, options.out / f"batch-{index:04}.txt") for index in range(options.batches)]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(sample_batch, *zip(*batches, strict=True)))

    stories = [story for _, _, file in batches for story in file.read_text(encoding="utf-8").split(END)]
    sources = {
        "stories": (good_stories(stories), HELD_OUT_EVERY),
        "grimm": (passages((options.text / "grimm.txt").read_text(encoding="utf-8")), 20),
        "alice": (passages((options.text / "alice.txt").read_text(encoding="utf-8")), 20),
    }
    for name, (documents, every) in sources.items():
        held_out = documents[::every]
        training = [document for place, document in enumerate(documents) if place % every]
        for part, chosen in ((name, training), (f"{name}.held-out", held_out)):
            text = f"\n{END}\n".join(chosen) + "\n"
            (options.out / f"{part}.txt").write_text(text, encoding="utf-8")
            print(f"{part}: {len(chosen)} documents, {len(text.encode())} bytes")


def sample_batch(index: int, teacher: Path, file: Path) -> None:
    """Samples the stories of one batch, all that ended by themselves, into its file."""
    if file.exists():
        return
    torch.set_num_threads(1)
    model, tokenizer = load_model(teacher), Tokenizer.from_pretrained(teacher)
    options = {"top_p": TOP_P, "seed": index}
    start = torch.full((BATCH, 1), tokenizer.bos_token_id)
    rows = model.generate(start, max_new_tokens=OPENING, temperature=OPENING_TEMPERATURE, eos_token_id=(), **options)
    ends = torch.tensor(model.generation_config.eos_token_ids)
    stories = []
    for length in (280, STORY):  # in two parts, so that the stories that have ended cost no more time
        new = length - rows.shape[1]
        rows = model.generate(rows, max_new_tokens=new, temperature=STORY_TEMPERATURE, **options)
        ended = torch.isin(rows[:, 1:], ends).any(dim=1)
        stories += [row[: int(torch.isin(row, ends).nonzero()[0])] for row in rows[ended][:, 1:]]
        rows = rows[~ended]
        if len(rows) == 0:
            break
    text = f"\n{END}\n".join(tokenizer.decode(story.tolist()).strip() for story in stories)
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def good_stories(stories: list[str]) -> list[str]:
    """The stories without what the teacher does when it has lost its way."""
    stories = [re.sub(r"\s*\n\s*", "\n\n", story.strip()) for story in stories]
    words = [re.findall(r"[A-Za-z']+", story.lower()) for story in stories]
    counts = Counter(word for story in words for word in story)
    good: dict[str, None] = {}  # a set that keeps the order
    for story, its_words in zip(stories, words, strict=True):
        phrases = Counter(zip(*(its_words[shift:] for shift in range(5)), strict=False))
        if (
            300 <= len(story) <= 2000
            and story.isascii()
            and story[-1] in '.!?"'
            and story.count('"') % 2 == 0
            and min(counts[word] for word in its_words) >= RAREST_WORD
            and max(phrases.values()) <= 2
        ):
            good[story] = None
    return list(good)


def passages(book: str, size: int = 1500) -> list[str]:
    """A book as documents of about `size` characters, cut between paragraphs, each paragraph on a line."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", book)]
    documents: list[list[str]] = [[]]
    for paragraph in paragraphs:
        is_heading = paragraph.isupper() or paragraph.startswith("CHAPTER")
        if is_heading or sum(map(len, documents[-1])) > size:
            documents.append([])
        if paragraph and not is_heading and "*" not in paragraph:
            documents[-1].append(paragraph)
    return ["\n\n".join(document) for document in documents if document]


if __name__ == "__main__":
    main()
