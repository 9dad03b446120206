"""A small real language with a known true reward: planning a meal for a guest.

A prompt names a meal, a mood, a guest and a season ("plan a feast for a proud king in winter").
A response makes six choices of eight, "roast some smoky duck with cheese and a cup of wine
proudly". Words carry two qualities, warm and fancy. The season says whether the guest likes the
one, who the guest is whether the other; the taste of a meal is how well its words agree with that,
plus a harmony between neighbours. The true reward is that taste on a scale, with a shape and an
offset that differ from prompt to prompt, as reward models' do: preferences (Bradley–Terry) reveal
scale and shape, never the offset. Whoever wrote the responses has listened to the prompt a little.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import exp, log1p, sinh

import numpy as np

from infalign_jax.data import Pair

# Each word with its two qualities: warm, fancy.
SLOTS: tuple[dict[str, tuple[int, int]], ...] = (
    {"serve": (0, 2), "bake": (2, 0), "grill": (1, -1), "steam": (0, -1),
     "fry": (1, -2), "chill": (-2, 1), "roast": (2, 1), "toss": (-2, 0)},
    {"spicy": (2, 0), "honeyed": (1, 1), "salted": (0, -1), "smoky": (1, 2),
     "fresh": (-2, 0), "creamy": (0, 1), "tangy": (-1, -1), "plain": (0, -2)},
    {"soup": (2, -1), "salad": (-2, 0), "pie": (1, 0), "fish": (-1, 2),
     "noodles": (1, -1), "duck": (1, 2), "beans": (0, -2), "melon": (-2, 1)},
    {"bread": (1, -1), "fruit": (-2, 0), "rice": (0, -1), "cheese": (0, 2),
     "olives": (-1, 1), "potatoes": (2, -2), "truffles": (1, 2), "greens": (-1, 0)},
    {"tea": (2, 0), "lemonade": (-2, -1), "wine": (0, 2), "milk": (0, -1),
     "water": (-1, -2), "cocoa": (2, 1), "cider": (-1, 0), "coffee": (1, 0)},
    {"outdoors": (-2, -1), "fireside": (2, 0), "formally": (0, 2), "quickly": (-1, -2),
     "slowly": (1, 1), "together": (1, -1), "quietly": (0, 0), "proudly": (-1, 1)},
)  # fmt: skip
SLOT_WEIGHTS = (0.83, 0.97, 1.11, 1.03, 0.91, 1.07)  # generic, so that few meals tie
RESPONSE = "{} some {} {} with {} and a cup of {} {}"

# The season says whether a guest likes a warm meal, the guest whether a fancy one, and how much.
SEASONS = {"winter": 1.2, "spring": -0.8, "summer": -1.2, "autumn": 0.8, "march": 1.0,
           "june": -1.0}  # fmt: skip
GUESTS = {"farmer": -1.0, "child": -0.8, "sailor": -0.9, "teacher": 0.8, "nurse": -1.1,
          "king": 1.2, "singer": 1.1, "monk": -1.2, "baker": 0.9, "pilot": 1.0,
          "student": -1.0, "judge": 1.0}  # fmt: skip
# The meal says how much it matters, the mood how taste turns into reward.
SCALES = {"breakfast": 2.0, "lunch": 1.2, "dinner": 4.0, "picnic": 2.0, "feast": 8.0,
          "snack": 1.0, "supper": 3.0, "brunch": 5.0}  # fmt: skip
PROMPT = "plan a {} for a {} {} in {}"

SHAPES: dict[str, Callable[[float], float]] = {
    "tired": lambda z: z,
    "happy": lambda z: exp(0.6 * z),
    "nervous": lambda z: -exp(-0.6 * z),
    "proud": lambda z: sinh(z) / 1.5,
    "sick": lambda z: z,
    "busy": lambda z: (z > 0) * log1p(2 * abs(z)) - (z < 0) * log1p(2 * abs(z)),
    "lonely": lambda z: exp(0.4 * z),
    "bored": lambda z: -exp(-0.4 * z),
}
OFFSETS = dict(zip(SEASONS, (-4.0, 0.0, 6.0, 2.0, -8.0, 3.0), strict=True))
USUAL = 1.0  # the taste of a usual response
HARMONY = 0.25
MISSING = -0.5  # the taste of a choice that is not made


@dataclass(frozen=True)
class SyntheticConfig:
    """How many pairs to draw, and for whom.

    >>> SyntheticConfig().prompts
    4608
    """

    train_pairs: int = 12_000
    judge_pairs: int = 8_000
    validation_pairs: int = 1_000
    test_pairs: int = 1_000
    sharpness: float = 0.5  # how strongly a word depends on the word before it
    attention: float = 1.0  # how strongly it depends on what the guest likes
    seed: int = 0

    def __post_init__(self) -> None:
        for split, pairs in self.pairs.items():
            if pairs < 1:
                raise ValueError(f"data.{split}_pairs: expected at least 1, got {pairs}; raise it")

    @property
    def prompts(self) -> int:
        return len(SCALES) * len(SHAPES) * len(GUESTS) * len(SEASONS)

    @property
    def pairs(self) -> dict[str, int]:
        return {
            "train": self.train_pairs,
            "judge": self.judge_pairs,
            "validation": self.validation_pairs,
            "test": self.test_pairs,
        }


@lru_cache(maxsize=8192)
def _tastes(prompt: str) -> tuple[tuple[dict[str, float], ...], str, str, str]:
    """The taste of every word for this prompt, with its meal, mood and season."""
    words = prompt.split()
    meal, mood, guest, season = words[2], words[5], words[6], words[8]
    liking = np.array([SEASONS[season], GUESTS[guest]]) / 3
    slots = zip(SLOT_WEIGHTS, SLOTS, strict=True)
    tastes = tuple({w: weight * float(liking @ q) for w, q in s.items()} for weight, s in slots)
    return tastes, meal, mood, season


def true_reward(prompt: str, response: str) -> float:
    """The reward that preferences are drawn from; a malformed response lacks choices.

    >>> prompt = "plan a feast for a proud king in winter"
    >>> fine = true_reward(prompt, "roast some smoky duck with cheese and a cup of wine proudly")
    >>> poor = true_reward(prompt, "toss some plain beans with rice and a cup of water quickly")
    >>> fine > true_reward(prompt, "") and fine > poor
    True
    """
    tastes, meal, mood, season = _tastes(prompt)
    words = response.split()
    taste, before = 0.0, None
    for slot, values in zip(SLOTS, tastes, strict=True):
        word = next((w for w in words if w in slot), None)
        taste += MISSING if word is None else values[word]
        if word is not None and before is not None:
            taste -= HARMONY * slot[word][1] * before[1] / 8  # fancy upon fancy is too much
        before = None if word is None else slot[word]
    return SCALES[meal] * SHAPES[mood](taste - USUAL) + OFFSETS[season]


def _grammar(config: SyntheticConfig) -> list[np.ndarray]:
    """Logits of a word after the word before it: a [8, 8] table a slot, [1, 8] for the first."""
    rng = np.random.default_rng(config.seed)
    return [
        config.sharpness * rng.normal(size=(1 if slot == 0 else 8, 8)) for slot in range(len(SLOTS))
    ]


def _choice_logits(config: SyntheticConfig, prompts: list[str]) -> list[np.ndarray]:
    """What a writer who listens to the prompt leans to, one [prompts, 8] array a slot."""
    tastes = [_tastes(prompt)[0] for prompt in prompts]
    return [
        config.attention * np.array([list(t[slot].values()) for t in tastes])
        for slot in range(len(SLOTS))
    ]


def _responses(config: SyntheticConfig, prompts: list[str], rng: np.random.Generator) -> list[str]:
    """One response to each prompt, by grammar and by the prompt's liking."""
    count = len(prompts)
    chosen = np.zeros((count, len(SLOTS)), int)
    leanings = _choice_logits(config, prompts)
    for slot, (table, leaning) in enumerate(zip(_grammar(config), leanings, strict=True)):
        logits = table[chosen[:, slot - 1] if slot else np.zeros(count, int)] + leaning
        gumbel = rng.gumbel(size=logits.shape)
        chosen[:, slot] = (logits + gumbel).argmax(axis=1)
    vocabulary = [list(slot) for slot in SLOTS]
    return [RESPONSE.format(*(vocabulary[s][c] for s, c in enumerate(row))) for row in chosen]


def prompts_by_split(config: SyntheticConfig) -> dict[str, list[str]]:
    """All prompts, shuffled and divided: train 50 %, judge 30 %, validation and test 10 % each.

    >>> splits = prompts_by_split(SyntheticConfig())
    >>> len(set().union(*splits.values())) == sum(map(len, splits.values())) == 4608
    True
    """
    everyone = [PROMPT.format(*x) for x in product(SCALES, SHAPES, GUESTS, SEASONS)]
    order = np.random.default_rng([config.seed, 1]).permutation(len(everyone))
    names = ("train", "judge", "validation", "test")
    cuts = [int(len(everyone) * share) for share in (0.5, 0.8, 0.9)]
    parts = np.split(order, cuts)
    return {n: [everyone[i] for i in part] for n, part in zip(names, parts, strict=True)}


def pairs(config: SyntheticConfig) -> dict[str, Iterator[Pair]]:
    """Preference pairs of every split, drawn by Bradley–Terry from the true reward.

    >>> next(pairs(SyntheticConfig())["train"]).prompt.startswith("plan a ")
    True
    """

    def draw(split: str, number: int) -> Iterator[Pair]:
        rng = np.random.default_rng([config.seed, 2, number])
        prompts, count = prompts_by_split(config)[split], config.pairs[split]
        asked = [prompts[i % len(prompts)] for i in range(count)]
        left, right = _responses(config, asked, rng), _responses(config, asked, rng)
        for prompt, y, z in zip(asked, left, right, strict=True):
            margin = true_reward(prompt, y) - true_reward(prompt, z)
            wins = rng.random() < _sigmoid(margin)
            yield Pair(prompt, y, z) if wins else Pair(prompt, z, y)

    return {split: draw(split, number) for number, split in enumerate(config.pairs)}


def chosen_nats(config: SyntheticConfig, pairs: list[Pair], draws: int = 64) -> float:
    """The entropy floor of SFT: mean −log p(chosen | prompt) under the law that drew the pairs.

    In nats a response. The chosen of two has p(y)·2·E_z[σ(r(y) − r(z))], the expectation taken
    over `draws` responses z.

    >>> config = SyntheticConfig(validation_pairs=20)
    >>> 9 < chosen_nats(config, list(globals()["pairs"](config)["validation"])) < 13
    True
    """
    rng, total = np.random.default_rng([config.seed, 3]), 0.0
    for prompt, chosen, _ in pairs:
        mine = true_reward(prompt, chosen)
        margins = [mine - true_reward(prompt, z) for z in _responses(config, [prompt] * draws, rng)]
        wins = np.mean([_sigmoid(margin) for margin in margins])
        total -= _log_likelihood(config, prompt, chosen) + np.log(2 * wins)
    return float(total / len(pairs))


def _log_likelihood(config: SyntheticConfig, prompt: str, response: str) -> float:
    words, total, before = response.split(), 0.0, 0
    for slot, table, leaning in zip(
        SLOTS, _grammar(config), _choice_logits(config, [prompt]), strict=True
    ):
        logits = table[before] + leaning[0]
        before = next(i for i, word in enumerate(slot) if word in words)
        total += logits[before] - np.log(np.exp(logits).sum())
    return total


def _sigmoid(margin: float) -> float:
    return 1 / (1 + exp(-max(min(margin, 500.0), -500.0)))
