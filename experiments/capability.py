"""Makes sae/bundled/capability.json: 300 easy multiple-choice questions from the lists below, the same on every run.

    python -m experiments.capability

Written for small hosts: facts that a model of 135M parameters can know. Wrong choices come from the same list.
"""

import random
from pathlib import Path

from sae import files

PATH = Path(__file__).parents[1] / "sae" / "bundled" / "capability.json"

CAPITALS = """\
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Japan Tokyo, China Beijing, Russia
Moscow, Egypt Cairo, Greece Athens, Austria Vienna, Poland Warsaw, Hungary Budapest, Ireland Dublin, Norway
Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Belgium Brussels, Cuba Havana, Peru Lima, Kenya
Nairobi, Canada Ottawa, Iraq Baghdad, Iran Tehran, Thailand Bangkok, Vietnam Hanoi, Argentina Buenos_Aires,
Turkey Ankara, Scotland Edinburgh, Chile Santiago, Australia Canberra, Switzerland Bern, Ukraine Kyiv, Romania
Bucharest, Bulgaria Sofia, Indonesia Jakarta, Syria Damascus, Nigeria Abuja, Ethiopia Addis_Ababa"""
OPPOSITES = """\
hot cold, big small, up down, fast slow, light dark, open closed, rich poor, young old, happy sad, wet dry, hard
soft, early late, full empty, strong weak, loud quiet, near far, high low, long short, thick thin, clean dirty,
heavy light, true false, good bad, left right, inside outside, first last, buy sell, push pull, love hate, win
lose, begin end, day night, summer winter, north south, east west, friend enemy, question answer, teacher
student, alive dead, war peace"""
PAST = """\
go went, see saw, eat ate, take took, give gave, come came, run ran, write wrote, speak spoke, drink drank, sing
sang, swim swam, fly flew, know knew, grow grew, throw threw, begin began, break broke, choose chose, drive
drove, fall fell, find found, forget forgot, hear heard, keep kept, leave left, make made, pay paid, sleep
slept, think thought"""
KINDS = """\
fruit apple banana orange grape peach pear; vegetable carrot onion cabbage spinach potato pea; animal dog horse
lion elephant rabbit sheep; bird eagle sparrow parrot owl penguin robin; fish salmon tuna shark trout cod
herring; tool hammer saw screwdriver drill wrench axe; instrument piano violin guitar drum flute trumpet; colour
red blue green yellow purple brown; metal iron gold silver copper tin lead; vehicle car bus train truck bicycle
ship"""
USES = """\
pen write with, knife cut with, broom sweep with, spoon eat soup with, key open a door with, clock tell the time
with, umbrella stay dry with, oven bake bread with, needle sew with, telescope look at stars with, camera take
pictures with, ladder climb with, pillow rest a head on, scale weigh things with, map find a way with, rope tie
things with, brush paint with, thermometer measure temperature with, glasses see better with, lamp light a room
with, boat cross a river with, shovel dig with, towel dry oneself with, bottle keep water in, wallet keep money
in, match light a fire with, fridge keep food cold in, microphone speak louder with, calendar look up a date in,
dictionary look up a word in"""
YOUNG = """\
dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, pig piglet, hen chick, duck duckling, lion
cub, deer fawn, goose gosling, swan cygnet, frog tadpole, owl owlet"""
WHERE = """\
fish water, bird nest, bee hive, king castle, farmer farm, doctor hospital, teacher school, priest church,
sailor ship, judge court, baker bakery, pilot aeroplane, actor theatre, waiter restaurant, prisoner prison,
spider web, lion zoo, monk monastery, scientist laboratory, artist studio"""
CONTINENTS = """\
Egypt Africa, Kenya Africa, Nigeria Africa, Morocco Africa, France Europe, Italy Europe, Poland Europe, Norway
Europe, China Asia, India Asia, Japan Asia, Vietnam Asia, Brazil South_America, Chile South_America, Peru
South_America, Argentina South_America, Ghana Africa, Spain Europe, Thailand Asia, Colombia South_America"""
ORDER = """\
Monday Tuesday Wednesday Thursday Friday Saturday Sunday; January February March April May June July August
September October November December"""


def pairs(text: str) -> list[tuple[str, str]]:
    """(first word, the rest) of a list with commas; _ stands for a space within a word."""
    some = (" ".join(one.split()).partition(" ") for one in text.split(","))
    return [(first, rest.replace("_", " ")) for first, _, rest in some]


def made() -> list[dict]:
    draw, rows = random.Random(0), []

    def add(kind: str, question: str, right: str, wrong: list[str]) -> None:
        choices = [right, *draw.sample(sorted({one for one in wrong if one != right}), 3)]
        draw.shuffle(choices)
        rows.append({"kind": kind, "question": question, "choices": choices, "answer": choices.index(right)})

    for kind, text, ask in (
        ("capital", CAPITALS, "What is the capital of {}?"),
        ("opposite", OPPOSITES, "What is the opposite of '{}'?"),
        ("past tense", PAST, "What is the past tense of '{}'?"),
        ("young", YOUNG, "What is a young {} called?"),
        ("place", WHERE, "Where would you look for a {}?"),
    ):
        some = pairs(text)
        for first, rest in some:
            add(kind, ask.format(first), rest, [other for _, other in some])
    uses = pairs(USES)
    for thing, use in uses:
        add("use", f"What does one {use}?", f"a {thing}", [f"a {other}" for other, _ in uses])
    for country, continent in pairs(CONTINENTS):
        add("continent", f"On which continent is {country}?", continent,
            ["Africa", "Europe", "Asia", "South America", "North America"])  # fmt: skip
    kinds = {words[0]: words[1:] for words in (one.split() for one in KINDS.split(";"))}
    for kind, members in kinds.items():
        others = [one for other, some in kinds.items() if other != kind for one in some]
        for member in members[:5]:
            article = "an" if kind[0] in "ai" else "a"
            wrong = [one for one in others if kind != "animal" or one not in kinds["bird"] + kinds["fish"]]
            add("kind", f"Which of these is {article} {kind}?", member, wrong)
    for names in ORDER.split(";"):
        some = names.split()
        for one, following in zip(some, some[1:], strict=False):
            add("order", f"What comes after {one}?", following, some)
    while len(rows) < 300:
        a, b = draw.randint(1, 12), draw.randint(1, 12)
        right = a + b
        question = f"What is {a} plus {b}?"
        if all(row["question"] != question for row in rows):
            add("sum", question, str(right), [str(right + d) for d in (-3, -2, -1, 1, 2, 3, 10) if right + d > 0])
    return rows


if __name__ == "__main__":
    files.write_json(PATH, made())
    print(f"{len(made())} questions in {PATH.name}")
