"""Small English dialogues in which people state, change and ask for facts: the text that the shipped backbone, the
quickstart and the `recall` task are made of.

A fact is an (attribute, value) pair such as (sister, Anna). A fifth of each attribute's values is *held out*, chosen by
checksum: no conversation for training ever holds a pair that a conversation for evaluation uses.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

HELD_OUT_SHARE = 5  # one value in five, for every attribute

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Kind:
    """Attributes that take the same values and are asked for in the same words."""

    question: str
    attributes: tuple[str, ...]
    values: tuple[str, ...]


def _kind(question: str, attributes: str, values: str) -> Kind:
    return Kind(question, tuple(attributes.split()), tuple(values.split()))


# Every statement says "my {attribute} is {value}": no verb betrays the kind, so what binds a value is its attribute.
KINDS = (
    _kind(
        "Who is my {a}?",
        "boss neighbour doctor teacher",
        "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Liam Mary Noah Olga Peter Quinn Rose "
        "Simon Tina Ugo Vera Walter Xenia Yara Zoe Alice Boris Carmen Diego Elena Felix Gina Hugo Irene Jonas "
        "Karl Laura Marco Nina",
    ),
    _kind(
        "What is the name of my {a}?",
        "dog cat horse parrot",
        "Rex Bella Fido Luna Max Daisy Rocky Coco Buddy Milo Lucky Shadow Ginger Pepper Oscar Tiger Misty "
        "Duke Whiskers Patch Biscuit Bandit Smokey Simba Nala Ziggy Waffles Scout Sparky Bruno Cleo Dexter "
        "Fluffy Gizmo Harley Jasper Kiki Lola Marley Nugget",
    ),
    _kind(
        "Where is my {a}?",
        "hometown birthplace destination residence",
        "Paris London Oslo Rome Madrid Berlin Lisbon Vienna Prague Dublin Athens Warsaw Cairo Tokyo Delhi "
        "Lima Quito Boston Chicago Denver Dallas Miami Seattle Toronto Sydney Nairobi Seoul Bangkok Havana "
        "Geneva Milan Naples Porto Lyon Hamburg Zurich Krakow Riga Tunis Dakar",
    ),
    _kind(
        "What colour is my {a}?",
        "car bike door boat",
        "red blue green yellow orange purple pink brown black white grey teal navy maroon olive cyan magenta "
        "violet indigo turquoise beige ivory crimson scarlet coral lavender lilac mauve mustard mint peach "
        "plum amber azure khaki burgundy charcoal aqua tan lime",
    ),
    _kind(
        "When is my {a}?",
        "exam wedding flight meeting",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July "
        "August September October November December noon midnight dawn dusk sunrise sunset tomorrow tonight "
        "spring summer autumn winter Easter Christmas Halloween Thanksgiving lunchtime teatime morning "
        "evening afternoon",
    ),
    _kind(
        "What do I have for {a}?",
        "breakfast lunch dinner dessert",
        "pizza pasta rice soup salad toast porridge pancakes eggs cheese bread beans lentils tofu curry tacos "
        "burritos noodles sushi ramen dumplings stew chicken fish steak bacon ham sausages potatoes carrots "
        "yoghurt cereal muesli granola waffle bagels croissants apples bananas grapes",
    ),
    _kind(
        "What is my {a}?",
        "hobby sport passion pastime",
        "chess football tennis golf hockey cricket rugby swimming running cycling hiking climbing skiing "
        "surfing sailing fishing dancing singing painting drawing reading writing cooking baking gardening "
        "knitting sewing pottery photography poetry magic puzzles poker karate judo boxing yoga archery "
        "rowing bowling",
    ),
    _kind(
        "Can you tell me my {a}?",
        "password codeword nickname username",
        "falcon eagle sparrow raven swan heron pelican penguin ostrich flamingo wolf fox bear otter badger "
        "beaver rabbit squirrel hedgehog moose camel zebra giraffe elephant rhino hippo lion leopard panther "
        "cheetah koala kangaroo dolphin whale shark octopus lobster turtle lizard dragon",
    ),
    _kind(
        "What is my {a} made of?",
        "ring table watch bracelet",
        "gold silver copper bronze iron steel tin brass wood oak pine maple walnut bamboo cork leather cotton "
        "silk wool linen paper cardboard plastic rubber glass crystal stone marble granite slate clay brick "
        "concrete jade ruby pearl bone wax nylon velvet",
    ),
)
KIND_OF = {attribute: kind for kind in KINDS for attribute in kind.attributes}

STATEMENTS = (
    "My {a} is {v}.",
    "By the way, my {a} is {v}.",
    "Remember that my {a} is {v}, please.",
    "I want you to know that my {a} is {v}.",
    "Did you know that my {a} is {v}?",
    "Just so you know, my {a} is {v}.",
    "Please note: my {a} is {v}.",
    "I should tell you that my {a} is {v}.",
    "For the record, my {a} is {v}.",
    "One more thing: my {a} is {v}.",
)
CHANGES = (
    "I was wrong, my {a} is {v}.",
    "Things have changed: my {a} is {v} now.",
    "Actually, my {a} is {v}.",
    "Correction: my {a} is {v}.",
)
QUESTIONS = (
    "What about my {a}?",
    "Tell me about my {a}.",
    "What did I say about my {a}?",
    "Do you remember my {a}?",
    "Remind me about my {a}, please.",
    "What do you know about my {a}?",
)
ANSWER = "Your {a} is {v}."
UNKNOWN = "You have not told me about your {a}."
ACKNOWLEDGEMENTS = ("Okay.", "Got it.", "Noted.", "I will remember that.", "Thank you.", "Good to know.")
SMALL_TALK = (
    ("Hello there!", "Hello! How can I help you?"),
    ("How are you today?", "I am fine, thank you."),
    ("It is raining again.", "Then take an umbrella."),
    ("I slept very well.", "That is nice to hear."),
    ("I am a little tired.", "Take a short break."),
    ("What a lovely day!", "Yes, enjoy it."),
    ("Can you help me?", "Of course."),
    ("I have a lot to do.", "One step at a time."),
    ("Do you like music?", "I like to hear about it."),
    ("That was funny.", "I am glad you liked it."),
)


@dataclass(frozen=True)
class Fact:
    attribute: str
    value: str

    def _say(self, form: str) -> str:
        return form.format(a=self.attribute, v=self.value)

    def statement(self, rng: random.Random) -> str:
        return self._say(rng.choice(STATEMENTS))

    def change(self, rng: random.Random) -> str:
        return self._say(rng.choice(CHANGES))

    def question(self, rng: random.Random) -> str:
        """Half of the questions are general, half in the words of the attribute's kind."""
        return self._say(rng.choice((rng.choice(QUESTIONS), KIND_OF[self.attribute].question)))

    @property
    def answer(self) -> str:
        return self._say(ANSWER)

    @property
    def unknown(self) -> str:
        """The answer where the fact was never stated."""
        return self._say(UNKNOWN)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _split(attribute: str) -> tuple[list[Fact], list[Fact]]:
    """All facts about one attribute: those for training, those held out."""
    facts = [Fact(attribute, value) for value in KIND_OF[attribute].values]
    facts.sort(key=lambda fact: zlib.crc32(f"{fact.attribute}={fact.value}".encode()))
    held_out = len(facts) // HELD_OUT_SHARE
    return facts[held_out:], facts[:held_out]


SPLITS = {attribute: _split(attribute) for attribute in KIND_OF}


def sample_facts(rng: random.Random, count: int, held_out: bool, kinds: int = len(KINDS)) -> list[Fact]:
    """`count` facts about different attributes, every one of them from the held-out pairs, or none.

    With few `kinds` (as many as `count` attributes need, at least) they are alike, and telling them apart takes more
    than knowing what sort of value goes with a question.
    """
    attributes = [attribute for kind in rng.sample(KINDS, kinds) for attribute in kind.attributes]
    return [sample_value(rng, attribute, held_out) for attribute in rng.sample(attributes, count)]


def sample_value(rng: random.Random, attribute: str, held_out: bool, other_than: str | None = None) -> Fact:
    return rng.choice([fact for fact in SPLITS[attribute][held_out] if fact.value != other_than])


def telling(
    rng: random.Random,
    facts: Sequence[Fact],
    held_out: bool,
    small_talk: float = 0.25,
    changed: float = 0.1,
    asked: float = 0.0,
) -> list[Message]:
    """A conversation that states `facts` in order.

    Before each statement comes a turn of small talk with probability `small_talk`, and after it, with probability
    `asked`, a question about something told so far, answered as it stands then. With probability `changed` one fact is
    first stated with another value (of the same split) and corrected afterwards: `facts` holds what is true in the end.
    """
    said = [(fact, fact.statement(rng)) for fact in facts]
    if facts and rng.random() < changed:
        index = rng.randrange(len(facts))
        fact = facts[index]
        stale = sample_value(rng, fact.attribute, held_out, other_than=fact.value)
        said[index] = (stale, stale.statement(rng))
        said.insert(rng.randint(index + 1, len(said)), (fact, fact.change(rng)))
    messages = []
    known: dict[str, Fact] = {}
    for fact, sentence in said:
        if rng.random() < small_talk:
            remark, reply = rng.choice(SMALL_TALK)
            messages += [user(remark), assistant(reply)]
        messages += acknowledged(rng, sentence)
        known[fact.attribute] = fact
        if asked and rng.random() < asked:
            messages += asking(rng, rng.choice(list(known.values())))
    return messages


def acknowledged(rng: random.Random, sentence: str) -> list[Message]:
    """A turn in which the user says a sentence."""
    return [user(sentence), assistant(rng.choice(ACKNOWLEDGEMENTS))]


def small_talk(rng: random.Random, turns: int) -> list[Message]:
    """Turns in which nothing is told."""
    pairs = [rng.choice(SMALL_TALK) for _ in range(turns)]
    return [message for remark, reply in pairs for message in (user(remark), assistant(reply))]


def other_facts(rng: random.Random, told: Sequence[Fact], turns: int, held_out: bool) -> list[Message]:
    """Turns about other attributes than those of `told`: each is stated, and once all have been, changed in turn."""
    attributes = untold(rng, told)
    known: dict[str, str] = {}
    messages = []
    for turn in range(turns):
        attribute = attributes[turn % len(attributes)]
        fact = sample_value(rng, attribute, held_out, other_than=known.get(attribute))
        messages += acknowledged(rng, fact.change(rng) if attribute in known else fact.statement(rng))
        known[attribute] = fact.value
    return messages


def untold(rng: random.Random, told: Sequence[Fact]) -> list[str]:
    """The attributes that none of `told` is about, in random order."""
    attributes = sorted(KIND_OF.keys() - {fact.attribute for fact in told})
    rng.shuffle(attributes)
    return attributes


def alike(rng: random.Random, told: Sequence[Fact], count: int, held_out: bool) -> list[Fact]:
    """`count` facts about other attributes, those of the kind of the first of `told` before those of the others' kinds,
    and these before all others."""
    kinds = [KIND_OF[fact.attribute] for fact in told]
    rank = {attribute: kinds.index(kind) if kind in kinds else len(kinds) for attribute, kind in KIND_OF.items()}
    nearest = sorted(untold(rng, told), key=lambda attribute: rank[attribute])[:count]
    return [sample_value(rng, attribute, held_out) for attribute in nearest]


def asking(rng: random.Random, fact: Fact) -> list[Message]:
    """A question about one fact and its answer."""
    return [user(fact.question(rng)), assistant(fact.answer)]


def lexicon() -> list[str]:
    """Every sentence form and value, for building a vocabulary: all the text these dialogues can hold."""
    sentences = [*ACKNOWLEDGEMENTS, *(text for pair in SMALL_TALK for text in pair)]
    rng = random.Random(0)
    for kind in KINDS:
        for index, value in enumerate(kind.values):
            fact = Fact(kind.attributes[index % len(kind.attributes)], value)
            sentences += [
                fact._say(form) for form in (*STATEMENTS, *CHANGES, *QUESTIONS, kind.question, ANSWER, UNKNOWN)
            ]
    rng.shuffle(sentences)
    return sentences
