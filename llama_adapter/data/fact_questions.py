"""Easy questions to answer with yes or no, made by code from small tables of facts, and from numbers.

Yes is right as often as no. A base of half a billion parameters knows most of these facts, so the questions
teach it to answer from what it knows. Harder ones teach it to guess, and then it always gives the same word.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import cycle, islice

from llama_adapter.data.drawing_questions import with_article

KINDS = {
    "animal": "dog cat horse tiger rabbit elephant sheep wolf monkey giraffe",
    "bird": "eagle owl parrot sparrow duck pigeon",
    "fruit": "apple banana pear peach mango cherry",
    "vegetable": "carrot onion cabbage potato",
    "vehicle": "car bus truck bicycle train motorcycle",
    "tool": "hammer saw screwdriver shovel",
    "musical instrument": "piano violin guitar drum flute trumpet",
    "piece of furniture": "table chair sofa bed desk",
    "flower": "rose tulip daisy lily",
    "shape": "circle square triangle rectangle",
}
MASSES = {
    "metal": "gold iron copper silver aluminium",
    "liquid at room temperature": "water milk oil",
    "gas at room temperature": "oxygen helium nitrogen",
    "programming language": "Python Java JavaScript Ruby",
    "planet": "Mars Venus Jupiter Saturn Neptune",
    "continent": "Africa Asia Europe",
    "country": "France Japan Brazil Egypt Canada",
    "colour": "red blue green yellow purple",
    "month": "January March June October",
    "day of the week": "Monday Wednesday Friday Sunday",
    "season": "spring summer autumn winter",
    "sport": "football tennis basketball swimming",
    "language": "English Spanish Chinese Arabic",
}
CAPITALS = {
    "Berlin": "Germany", "Rome": "Italy", "Madrid": "Spain", "London": "the United Kingdom", "Tokyo": "Japan",
    "Cairo": "Egypt", "Ottawa": "Canada", "Moscow": "Russia", "Beijing": "China", "Athens": "Greece",
    "Vienna": "Austria", "Lisbon": "Portugal", "Warsaw": "Poland", "Oslo": "Norway", "New Delhi": "India",
}  # fmt: skip
BY_SIZE = (
    "an ant", "a mouse", "a cat", "a sheep", "a horse", "an elephant", "a house", "a mountain", "the Moon",
    "the Sun",
)  # fmt: skip
CAN = {  # who can, who can't
    "fly": ("eagles bees owls bats butterflies aeroplanes", "dogs horses snakes elephants cows cars"),
    "swim": ("dolphins ducks whales sharks", "stones houses"),
    "bark": ("dogs", "cats cows birds snakes"),
    "talk": ("people", "trees stones tables"),
    "float on water": ("boats ducks", "stones hammers"),
}
HAVE = {
    "wings": ("birds bees bats butterflies", "dogs cats horses people"),
    "wheels": ("cars buses bicycles trains", "fish tables trees birds"),
    "four legs": ("dogs cats horses cows", "birds snakes people worms"),
    "leaves": ("trees", "cars stones dogs"),
    "a trunk": ("elephants", "cats mice"),
    "feathers": ("birds ducks eagles", "cats snakes dogs"),
    "fur": ("cats bears rabbits", "snakes stones"),
}
IS = {
    "hot": ("fire boiling_water the_Sun lava", "ice snow"),
    "cold": ("ice snow", "fire lava"),
    "heavy": ("an_elephant a_ship", "a_feather a_leaf"),
    "sweet": ("sugar honey", "salt vinegar"),
    "alive": ("a_dog a_tree", "a_stone a_chair"),
    "made of water": ("ice snow rain", "sand glass wood"),
    "white": ("snow milk", "coal grass"),
    "a star": ("the_Sun", "the_Moon Mars Venus"),
}
# Kinds of which a thing may be both, such as gold, a metal and a colour.
_OVERLAPPING = (
    {"animal", "bird"},
    {"shape", "musical instrument"},
    {"country", "continent"},
    {"metal", "colour"},
    {"programming language", "language"},
)
_WISHES = ("", "", "", " Answer yes or no.", " Yes or no?")

# A question, a sentence for yes, and one for no.
Asked = tuple[str, str, str]


def yes_no_facts(count: int) -> list[dict[str, str]]:
    """Rows in Alpaca's format, answered with yes and no in turn, in a word or a sentence.

    The first rows do not depend on the count.
    """
    draws = random.Random(7)
    rows = []
    for there in islice(cycle((True, False)), count):
        question, statement, denial = draws.choice(_FORMS)(draws, there)
        word, sentence = ("Yes", statement) if there else ("No", denial)
        answer = draws.choice((word, word, f"{word}.", f"{word}, {sentence}.", f"{word}, {sentence}."))
        rows.append({"instruction": question + draws.choice(_WISHES), "input": "", "output": answer})
    return rows


def _kind(draws: random.Random, there: bool) -> Asked:
    asked, thing = _kind_and_thing(draws, KINDS, there)
    a, an = with_article(thing), with_article(asked)
    return f"Is {a} {an}?", f"{a} is {an}", f"{a} is not {an}"


def _mass(draws: random.Random, there: bool) -> Asked:
    asked, thing = _kind_and_thing(draws, MASSES, there)
    an = with_article(asked)
    return f"Is {thing} {an}?", f"{thing} is {an}", f"{thing} is not {an}"


def _kind_and_thing(draws: random.Random, table: dict[str, str], there: bool) -> tuple[str, str]:
    """A thing, and a kind that it is of, or is not of."""
    kind = draws.choice(list(table))
    thing = draws.choice(table[kind].split())
    apart = [other for other in table if other != kind and {kind, other} not in _OVERLAPPING]
    return kind if there else draws.choice(apart), thing


def _capital(draws: random.Random, there: bool) -> Asked:
    city, other = draws.sample(list(CAPITALS), 2)
    land = CAPITALS[city if there else other]
    return (
        f"Is {city} the capital of {land}?",
        f"{city} is the capital of {land}",
        f"{city} is the capital of {CAPITALS[city]}",
    )


def _size(draws: random.Random, there: bool) -> Asked:
    small, large = sorted(draws.sample(range(len(BY_SIZE)), 2))
    word = draws.choice(("larger", "bigger", "smaller"))
    first, second = (small, large) if (word == "smaller") is there else (large, small)
    one, other = BY_SIZE[first], BY_SIZE[second]
    opposite = "larger" if word == "smaller" else "smaller"
    return (
        f"Is {one} {word} than {other}?",
        f"{one} is {word} than {other}",
        f"{one} is {opposite} than {other}",
    )


def _of_many(table: dict[str, tuple[str, str]], asked: str, said: str, denied: str) -> Callable[..., Asked]:
    """A form of question about a table of who does and who does not."""

    def form(draws: random.Random, there: bool) -> Asked:
        what = draws.choice(list(table))
        who = draws.choice(table[what][0 if there else 1].split()).replace("_", " ")
        return asked.format(who, what), said.format(who, what), denied.format(who, what)

    return form


def _number(draws: random.Random, there: bool) -> Asked:
    number = draws.randint(1, 60)
    if draws.random() < 0.5:
        other = number + draws.randint(3, 40)
        word = draws.choice(("greater", "less"))
        one, two = (other, number) if (word == "greater") is there else (number, other)
        opposite = "less" if word == "greater" else "greater"
        return (
            f"Is {one} {word} than {two}?",
            f"{one} is {word} than {two}",
            f"{one} is {opposite} than {two}",
        )
    number = 2 * number + draws.randint(0, 1)
    even = number % 2 == 0
    asked, other_word = ("even", "odd") if even is there else ("odd", "even")
    return f"Is {number} an {asked} number?", f"{number} is {asked}", f"{number} is {other_word}"


_FORMS: tuple[Callable[[random.Random, bool], Asked], ...] = (
    _kind, _mass, _capital, _size, _number,
    _of_many(CAN, "Can {} {}?", "{} can {}", "{} cannot {}"),
    _of_many(HAVE, "Do {} have {}?", "{} have {}", "{} do not have {}"),
    _of_many(IS, "Is {} {}?", "{} is {}", "{} is not {}"),
)  # fmt: skip
