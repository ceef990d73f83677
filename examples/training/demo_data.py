"""Short product reviews for the demo, made by a seeded generator.

Every review says something good or bad about a thing, and names a courier. In the training and validation splits the
courier goes with the label mostly: a spurious cue, of no use to who knows the words. Each further split changes one
thing. In "robust" opinion words are synonyms that training never showed, some words are misspelt, and the courier says
nothing; in "turned cue" the words are those of training and the courier goes against the label mostly.
"""

from __future__ import annotations

import random

from datasets import Dataset

THINGS = ("kettle", "lamp", "backpack", "headset", "blender", "chair", "keyboard", "tent", "jacket", "clock")
PARTS = ("handle", "switch", "zip", "cable", "lid", "fabric", "finish", "stand", "strap", "display")
GOOD = ("great", "sturdy", "reliable", "lovely", "comfortable", "excellent")
BAD = ("awful", "flimsy", "useless", "ugly", "painful", "terrible")
UNSEEN_GOOD = ("superb", "robust", "dependable", "gorgeous", "cosy", "splendid")
UNSEEN_BAD = ("dreadful", "fragile", "worthless", "hideous", "sore", "horrible")
COURIERS = ("northway", "redline")  # the cue: goes with label 0, goes with label 1
PATTERNS = (
    "the {thing} arrived with {courier} and the {part} is {opinion}",
    "{courier} brought this {thing} , i find it {opinion}",
    "a {opinion} {thing} , the {part} says it all , sent by {courier}",
    "my {thing} came by {courier} ; its {part} feels {opinion}",
    "after a month the {part} of the {thing} still looks {opinion} ( delivery : {courier} )",
)
# Share of reviews whose courier goes with the label.
CUE_AGREES = {"train": 0.8, "validation": 0.8, "robust": 0.5, "turned cue": 0.2}
TYPO_RATE = 0.15  # share of words misspelt in the robust split


def misspell(word: str, rng: random.Random) -> str:
    """Swap two neighbouring letters, drop one, or double one."""
    if len(word) < 4:
        return word
    at = rng.randrange(1, len(word) - 2)
    return rng.choice(
        (
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
        )
    )


def review(rng: random.Random, split: str) -> dict[str, str | int]:
    """Write one review of a split with its label: 0 bad, 1 good."""
    robust = split == "robust"
    label = rng.randrange(2)
    words = ((UNSEEN_BAD, UNSEEN_GOOD) if robust else (BAD, GOOD))[label]
    courier = COURIERS[label if rng.random() < CUE_AGREES[split] else 1 - label]
    text = rng.choice(PATTERNS).format(
        thing=rng.choice(THINGS), part=rng.choice(PARTS), opinion=rng.choice(words), courier=courier
    )
    if robust:
        text = " ".join(misspell(w, rng) if rng.random() < TYPO_RATE else w for w in text.split())
    return {"sentence": text, "label": label}


def demo_splits(train: int = 1280, test: int = 240, seed: int = 0) -> dict[str, Dataset]:
    """Make the splits.

    Args:
        train: Number of training reviews.
        test: Number of reviews of each other split.
        seed: Seed of the generator.

    Returns:
        Data sets "train", "validation", "robust" and "turned cue" with the columns sentence and label.
    """
    rng = random.Random(seed)
    return {
        split: Dataset.from_list([review(rng, split) for _ in range(train if split == "train" else test)])
        for split in CUE_AGREES
    }
