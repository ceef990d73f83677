"""The attacks by name: what each needs, and how it is built from TextAttack's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UnknownRecipeError
from .offline import import_textattack, quiet, without_downloads
from .resources import (
    NLTK_STOPWORDS,
    NLTK_WORDNET,
    Resource,
    flair_model,
    hub_model,
    nltk_data,
    package,
    textattack_file,
    textattack_table,
    tfhub_model,
)

_EMBEDDINGS = textattack_file("word_embeddings/paragramcf", "the counter-fitted word embeddings")
_LANGUAGE_MODEL = textattack_file(
    "constraints/grammaticality/language-models/learning-to-write", "the learning-to-write language model"
)
_TABLE = textattack_table("shared/intentional_homoglyphs.txt")
_SENTENCE_ENCODER = (
    package("tensorflow_hub"),
    tfhub_model("https://tfhub.dev/google/universal-sentence-encoder/3", "the Universal Sentence Encoder"),
)
_TAGGER = (
    nltk_data("taggers/averaged_perceptron_tagger_eng", "part-of-speech tagger"),
    nltk_data("taggers/universal_tagset", "universal tag set"),
)


@dataclass(frozen=True)
class Recipe:
    """One attack.

    Args:
        name: Name by which the kit knows it.
        source: Where it was published.
        build: Makes the TextAttack `Attack` for a wrapped model.
        needs: What it needs beyond TextAttack itself.
        offline: Whether it belongs to the preset "offline".
    """

    name: str
    source: str
    build: Callable[[Any], Any]
    needs: tuple[Resource, ...] = ()
    offline: bool = False

    def lacks(self, allow_downloads: bool = False) -> list[str]:
        """Return one sentence for each thing that is missing on this machine.

        Args:
            allow_downloads: Leave out what the attack fetches by itself.
        """
        found = []
        for resource in self.needs:
            lack = resource.lack()
            if lack and not (allow_downloads and resource.fetched_in_use):
                found.append(lack)
        return found


def _published(class_name: str, **arguments: Any) -> Callable[[Any], Any]:
    """Build a recipe as TextAttack ships it."""

    def build(wrapper: Any) -> Any:
        return getattr(import_textattack().attack_recipes, class_name).build(wrapper, **arguments)

    return build


def _bad_characters(wrapper: Any) -> Any:
    """Replace one letter by a look-alike, untargeted (TextAttack's recipe wants a goal function to be named)."""
    textattack = import_textattack()
    from .bad_characters import HomoglyphSearch, HomoglyphSwap

    return textattack.Attack(
        textattack.goal_functions.UntargetedClassification(wrapper),
        [],
        HomoglyphSwap(),
        HomoglyphSearch(),
    )


def _wordnet(wrapper: Any) -> Any:
    """Replace at most a fifth of the words by WordNet synonyms, the most important words first.

    The search of TextFooler with WordNet in place of embeddings. PWWS, which has no limit on words, is the stronger
    and less natural of the two.
    """
    textattack = import_textattack()
    constraints = textattack.constraints
    return textattack.Attack(
        textattack.goal_functions.UntargetedClassification(wrapper),
        [
            constraints.pre_transformation.RepeatModification(),
            constraints.pre_transformation.StopwordModification(),
            constraints.pre_transformation.MinWordLength(3),
            constraints.overlap.MaxWordsPerturbed(max_percent=0.2),
        ],
        textattack.transformations.WordSwapWordNet(),
        textattack.search_methods.GreedyWordSwapWIR(wir_method="delete"),
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "deepwordbug",
            "Gao et al. 2018, https://arxiv.org/abs/1801.04354",
            _published("DeepWordBugGao2018"),
            (NLTK_STOPWORDS,),
            offline=True,
        ),
        Recipe(
            "pruthi",
            "Pruthi et al. 2019, https://arxiv.org/abs/1905.11268",
            _published("Pruthi2019"),
            (NLTK_STOPWORDS,),
            offline=True,
        ),
        Recipe(
            "pwws",
            "Ren et al. 2019, https://aclanthology.org/P19-1103",
            _published("PWWSRen2019"),
            (NLTK_STOPWORDS, NLTK_WORDNET),
            offline=True,
        ),
        Recipe(
            "bad-characters",
            "Boucher et al. 2021, https://arxiv.org/abs/2106.09898",
            _bad_characters,
            offline=True,
        ),
        Recipe(
            "wordnet",
            "composed here: the search of Jin et al. 2019, https://arxiv.org/abs/1907.11932, with WordNet",
            _wordnet,
            (NLTK_STOPWORDS, NLTK_WORDNET),
            offline=True,
        ),
        Recipe(
            "leap",
            "Xiao et al. 2023, https://arxiv.org/abs/2308.11284",
            _published("LEAP2023"),
            (NLTK_STOPWORDS, NLTK_WORDNET),
        ),
        Recipe(
            "textfooler",
            "Jin et al. 2019, https://arxiv.org/abs/1907.11932",
            _published("TextFoolerJin2019"),
            (_EMBEDDINGS, *_TAGGER, *_SENTENCE_ENCODER),
        ),
        Recipe(
            "textbugger",
            "Li et al. 2018, https://arxiv.org/abs/1812.05271",
            _published("TextBuggerLi2018"),
            (NLTK_STOPWORDS, _TABLE, _EMBEDDINGS, *_SENTENCE_ENCODER),
        ),
        Recipe(
            "bae",
            "Garg and Ramakrishnan 2019, https://arxiv.org/abs/2004.01970",
            _published("BAEGarg2019"),
            (NLTK_STOPWORDS, hub_model("bert-base-uncased"), *_TAGGER, *_SENTENCE_ENCODER),
        ),
        Recipe(
            "bert-attack",
            "Li et al. 2020, https://arxiv.org/abs/2004.09984",
            _published("BERTAttackLi2020"),
            (NLTK_STOPWORDS, hub_model("bert-base-uncased"), *_SENTENCE_ENCODER),
        ),
        Recipe(
            "clare",
            "Li et al. 2020, https://arxiv.org/abs/2009.07502",
            _published("CLARE2020"),
            (NLTK_STOPWORDS, hub_model("distilroberta-base"), flair_model("upos-english-fast"), *_SENTENCE_ENCODER),
        ),
        Recipe(
            "a2t",
            "Yoo and Qi 2021, https://arxiv.org/abs/2109.00544",
            _published("A2TYoo2021"),
            (
                NLTK_STOPWORDS,
                _EMBEDDINGS,
                *_TAGGER,
                package("sentence_transformers", "sentence-transformers"),
                hub_model("sentence-transformers/stsb-distilbert-base"),
            ),
        ),
        Recipe(
            "checklist",
            "Ribeiro et al. 2020, https://arxiv.org/abs/2005.04118",
            _published("CheckList2020"),
            (flair_model("ner-english"),),
        ),
        Recipe(
            "iga",
            "Wang et al. 2019, https://arxiv.org/abs/1909.06723",
            _published("IGAWang2019"),
            (NLTK_STOPWORDS, _EMBEDDINGS),
        ),
        Recipe(
            "faster-genetic",
            "Jia et al. 2019, https://arxiv.org/abs/1909.00986",
            _published("FasterGeneticAlgorithmJia2019"),
            (NLTK_STOPWORDS, _EMBEDDINGS, _LANGUAGE_MODEL),
        ),
        Recipe(
            "pso",
            "Zang et al. 2020, https://aclanthology.org/2020.acl-main.540",
            _published("PSOZang2020"),
            (
                NLTK_STOPWORDS,
                textattack_file("transformations/hownet/word_candidates_sense.pkl", "the HowNet synonyms"),
                flair_model("upos-english-fast"),
            ),
        ),
    )
}
"""The attacks that the kit knows, by name, with what each needs."""

PRESETS: dict[str, tuple[str, ...]] = {
    "offline": tuple(recipe.name for recipe in RECIPES.values() if recipe.offline),
    "all": tuple(RECIPES),
}
"""Names for several recipes at once."""


def expand(names: Sequence[str]) -> list[str]:
    """Replace presets ("offline", "all") by their recipes and drop repetitions; unknown names stay."""
    expanded = [name for entry in names for name in PRESETS.get(entry, (entry,))]
    return list(dict.fromkeys(expanded))


def get_recipe(name: str) -> Recipe:
    """Look a recipe up by name.

    Raises:
        UnknownRecipeError: If there is none of this name.
    """
    if name not in RECIPES:
        raise UnknownRecipeError(
            f"recipe={name!r} is unknown; the kit knows {', '.join(RECIPES)}, and the presets {', '.join(PRESETS)}."
        )
    return RECIPES[name]


def build_attack(recipe: Recipe, wrapper: Any, query_budget: int | None, batch_size: int, downloads: bool) -> Any:
    """Build a recipe for a wrapped model.

    Args:
        recipe: The recipe.
        wrapper: The wrapped model.
        query_budget: Model queries that one example may cost; None for no limit.
        batch_size: Texts per call of the model.
        downloads: Let TextAttack download what it is missing, and load what it would load only in use.

    Returns:
        A `textattack.Attack`.
    """
    if downloads:
        attack = recipe.build(wrapper)
        for constraint in attack.constraints:
            # The sentence encoder is loaded on first use; a download that fails is to show before anything runs.
            if hasattr(constraint, "encode"):
                constraint.encode(["warm up"])
    else:
        with quiet(), without_downloads():
            attack = recipe.build(wrapper)
    attack.goal_function.batch_size = batch_size
    if query_budget is not None:
        attack.goal_function.query_budget = query_budget
    return attack
