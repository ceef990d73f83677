"""The recipes that need downloads, run by the script with small stand-ins where they look for their resources."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from rose_peft.robustness.results import load_result
from tests.helpers.victims import REPOSITORY, WORDS, need_textattack, nltk_folder, tiny_bert

RECIPES = ("textfooler", "textbugger", "bae", "bert-attack", "iga")
SYNONYMS = (("good", "great"), ("bad", "dull"), ("film", "story"), ("very", "not"))
SENTENCE_ENCODER = "https://tfhub.dev/google/universal-sentence-encoder/3"
TENSORFLOW_HUB = f"""
import numpy

class Encoding(numpy.ndarray):
    def numpy(self):
        return numpy.asarray(self)

def load(url):
    assert url == {SENTENCE_ENCODER!r}
    count = lambda text: [1.0 + text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return lambda sentences: numpy.array([count(text) for text in sentences]).view(Encoding)
"""


def write_embeddings(folder: Path) -> None:
    """Word vectors in the files of the counter-fitted ones: of each two synonyms, either is the other's neighbour."""
    folder.mkdir(parents=True)
    words = [word for pair in SYNONYMS for word in pair]
    vectors = np.repeat(np.eye(len(SYNONYMS), dtype=np.float32), 2, axis=0)
    vectors[::2] += 0.01
    neighbours = np.array([[index, index ^ 1] for index in range(len(words))])
    np.save(folder / "paragram.npy", vectors)
    np.save(folder / "nn.npy", neighbours)
    for name, content in (
        ("wordlist.pickle", {word: index for index, word in enumerate(words)}),
        ("mse_dist.p", defaultdict(dict)),
        ("cos_sim.p", defaultdict(dict)),
    ):
        (folder / name).write_bytes(pickle.dumps(content))


def write_tagger(folder: Path) -> None:
    """A part-of-speech tagger that calls everything an adjective."""
    from nltk.tag.perceptron import PerceptronTagger

    place = folder / "averaged_perceptron_tagger_eng"
    place.mkdir(parents=True)
    tagger = PerceptronTagger(load=False)
    tagger.train([[(word, "JJ") for word in WORDS]])
    for part, content in (("weights", tagger.model.weights), ("tagdict", tagger.tagdict), ("classes", ["JJ"])):
        (place / f"averaged_perceptron_tagger_eng.{part}.json").write_text(json.dumps(content))
    (folder / "universal_tagset").mkdir()
    (folder / "universal_tagset" / "en-ptb.map").write_text("JJ\tADJ\n")


def write_masked_model(hub: Path, tokenizer: Any) -> None:
    """A random masked language model in the hub's cache under the name of the real one."""
    from transformers import BertForMaskedLM

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    repository = hub / "models--bert-base-uncased"
    snapshot = repository / "snapshots" / ("0" * 40)
    BertForMaskedLM(tiny_bert(tokenizer, max_position_embeddings=512).config).save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def write_textattack(site: Path) -> None:
    """TextAttack by links, with the table of look-alikes that its published package lacks."""
    spec = find_spec("textattack")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, site / "textattack", copy_function=os.symlink)
    table = site / "textattack" / "shared" / "intentional_homoglyphs.txt"
    table.unlink(missing_ok=True)
    table.write_text("# nothing but the letters that TextAttack knows itself\n", encoding="utf-8")


@pytest.fixture
def stand_ins(tokenizer: Any, tmp_path: Path) -> dict[str, str]:
    """Environment in which all resources are found, and no network."""
    need_textattack()
    write_embeddings(tmp_path / "textattack" / "word_embeddings" / "paragramcf")
    write_tagger(tmp_path / "nltk" / "taggers")
    write_masked_model(tmp_path / "hub", tokenizer)
    write_textattack(tmp_path / "site")
    (tmp_path / "site" / "tensorflow_hub.py").write_text(TENSORFLOW_HUB)
    (tmp_path / "tfhub" / hashlib.sha1(SENTENCE_ENCODER.encode()).hexdigest()).mkdir(parents=True)
    paths = [str(tmp_path / "site"), str(REPOSITORY)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TA_CACHE_DIR": str(tmp_path / "textattack"),
        "NLTK_DATA": os.pathsep.join([str(tmp_path / "nltk"), nltk_folder()]),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TFHUB_CACHE_DIR": str(tmp_path / "tfhub"),
    }


def test_full_recipes_run_where_their_resources_are(stand_ins: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
    tiny_bert(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [("the story was good", 1), ("a dull film and a bad plot", 1), ("it is great", 1), ("very boring", 0)]
    pandas.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "data.csv", index=False)
    command = [sys.executable, "-m", "rose_peft.robustness", "attack"]
    command += ["--model", str(tmp_path / "model"), "--data_file", str(tmp_path / "data.csv")]
    command += ["--text_columns", "text", "--recipes", *RECIPES, "--query_budget", "200"]
    command += ["--output_dir", str(tmp_path / "attack")]
    done = subprocess.run(command, env=stand_ins, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "does not run" not in done.stderr and "broke" not in done.stderr, done.stderr
    assert load_result(tmp_path / "attack" / "attack.result.json").config["unavailable"] == {}
    table = pandas.read_csv(tmp_path / "attack" / "examples.csv")
    assert set(table["recipe"]) == set(RECIPES)
    assert "error" not in set(table["result"])

    changed: dict[str, set[tuple[str, str]]] = {name: set() for name in RECIPES}
    for row in table[table["result"] != "skipped"].itertuples():
        words = zip(row.original_text.split(), row.perturbed_text.split(), strict=False)
        changed[row.recipe] |= {(old, new) for old, new in words if old != new}
    synonyms = {pair for a, b in SYNONYMS for pair in ((a, b), (b, a))}
    for name in ("textfooler", "iga"):
        assert changed[name] and changed[name] <= synonyms, name
    for name in ("bae", "bert-attack"):
        # The random model proposes words of its own vocabulary, among them some that are no synonyms.
        assert changed[name] - synonyms, name
        assert {new for _, new in changed[name]} <= set(tokenizer.get_vocab()), name
    assert changed["textbugger"] - synonyms  # it also misspells
