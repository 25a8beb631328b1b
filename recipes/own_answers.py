"""Generate a base model's answers to questions that need no memory, as `data.unrelated` of a recipe.

Command: python recipes/own_answers.py BASE OUT.jsonl [--count 1280] [--new-tokens 64] [--seed 0]

Four of five are answers to questions. The others are replies to remarks, most of which tell a fact like those in the
training data. Half of them are greedy, half are sampled at temperature 1. An answer may end in the middle of a
sentence, because training uses the base model's distribution after each token, and not the text. `deltamem eval --task
agreement` asks none of these questions.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import click
from own_texts import BATCH, SYSTEM, Base, arguments, write_rows

from deltamem_tool.cli.console import progress
from deltamem_tool.data.fact_conversations import statement_sentence
from deltamem_tool.data.fact_words import NOTHING, SMALL_TALK, SYSTEMS
from deltamem_tool.data.facts import sample_facts
from deltamem_tool.evaluation.tasks.agreement import QUESTIONS

REMARKS = 0.2  # share of remarks

TEMPLATES = {
    "thing": (
        "What is {}?",
        "Explain {} to a child.",
        "Tell me something interesting about {}.",
        "Write two sentences about {}.",
        "Why is {} important?",
        "Describe {} in one sentence.",
        "Write a short poem about {}.",
        "Where does the word for {} come from?",
        "Give me three facts about {}.",
        "What do people often get wrong about {}?",
        "What would a beginner need to know about {}?",
        "Write a headline for an article about {}.",
    ),
    "country": (
        "Where is {}?",
        "Which language do people speak in {}?",
        "What is {} known for?",
        "Name a city in {}.",
        "What do people eat in {}?",
        "Is {} larger than France?",
        "What should I see on a trip to {}?",
    ),
    "task": (
        "How do I {}?",
        "Give me a tip on how to {}.",
        "What is the first step if I want to {}?",
        "How long does it take to {}?",
        "Write an email to a friend about how to {}.",
        "What do I need to {}?",
    ),
    "code": (
        "Write a Python function that {}.",
        "How would you write a program that {}?",
        "Write a shell command that {}.",
    ),
    "sum": ("What is {}?", "Compute {}.", "Is {} more than 50?"),
    "word": (
        "What does the word “{}” mean?",
        "Use the word “{}” in a sentence.",
        "Give a word that rhymes with “{}”.",
        "What is the opposite of “{}”?",
        "Spell “{}” backwards.",
        "Translate “{}” into Spanish.",
    ),
}
WORDS = {
    "thing": "photosynthesis|the moon|a volcano|jazz|chess|democracy|the Roman Empire|a black hole|evolution|inflation|"
    "the human heart|a rainbow|electricity|the Internet|climate change|Shakespeare|the piano|vitamin C|sleep|"
    "a telescope|coffee|the Great Wall|dinosaurs|friendship|a battery|the immune system|a bicycle|gold|rice|the sea|"
    "machine learning|a thunderstorm|philosophy|the printing press|yoga|a computer virus|the Olympic Games|bread|"
    "the sun|an earthquake|a vaccine|glass|the theatre|a spider|honesty|football|the violin|steam|paper|winter",
    "country": "Japan|Brazil|Egypt|Canada|Norway|India|Kenya|Mexico|Poland|Vietnam|Australia|Turkey|Peru|Iceland|Spain|"
    "Thailand|Morocco|Greece|Argentina|Finland|Indonesia|Ireland|Nigeria|Switzerland|New Zealand",
    "task": "bake bread|learn to swim|fix a flat tyre|write a letter of thanks|plant tomatoes|prepare for an interview|"
    "save money|tie a tie|train a puppy|make a paper plane|learn a new language|clean a window|boil an egg|draw a cat|"
    "sleep better|run faster|organise a birthday party|read more books|paint a wall|make tea|pack a suitcase|"
    "take good photographs|grow herbs indoors|remove a stain|speak in public",
    "code": "sorts a list of numbers|counts the words of a text|checks whether a number is even|reads a CSV file|"
    "finds the largest number|prints the numbers from 1 to 10|removes duplicates|downloads a web page|"
    "computes a factorial|renames all files in a folder|converts Celsius to Fahrenheit|joins two lists",
    "sum": "12 plus 30|7 times 6|100 minus 37|45 divided by 9|8 squared|20 percent of 90|15 plus 48|13 times 4|"
    "half of 86|a third of 60|99 minus 58|6 times 12|81 divided by 3|25 plus 26|11 squared|the sum of 4, 8 and 15",
    "word": "bright|gather|river|ancient|quick|courage|gentle|market|frequent|borrow|silent|harvest|cheerful|narrow|"
    "promise|winter|curious|travel|heavy|simple|wisdom|garden|repair|famous|lonely",
}


def questions(count: int, seed: int) -> list[str]:
    """Draw `count` different questions."""
    asked = set(QUESTIONS.read_text(encoding="utf-8").splitlines())
    every = {
        template.format(word)
        for kind, templates in TEMPLATES.items()
        for template, word in itertools.product(templates, WORDS[kind].split("|"))
    }
    known = sorted(every - asked)
    if count > len(known):
        raise click.BadParameter(f"There are {len(known)} questions.", param_hint="--count")
    return random.Random(seed).sample(known, count)


def remarks(count: int, seed: int) -> list[str]:
    """Draw `count` remarks: facts and small talk."""
    rng = random.Random(seed)
    facts = [sample_facts(rng, 1, NOTHING, third_person=0.25)[0] for _ in range(count)]
    told = [statement_sentence(rng, fact, "chat", NOTHING) for fact in facts]
    return rng.sample([*told, *(remark for remark, _ in SMALL_TALK)], count)


@click.command()
@arguments(count=1280, new_tokens=64)
def main(base: str, out: Path, count: int, new_tokens: int, seed: int) -> None:
    """Write the answers of BASE to COUNT questions and remarks."""
    model, rng = Base(base, seed), random.Random(seed)
    talks = []
    said = remarks(round(REMARKS * count), seed)
    for text in rng.sample([*said, *questions(count - len(said), seed)], count):
        system = (
            [{"role": "system", "content": rng.choice(SYSTEMS) if rng.random() < 0.5 else ""}]
            if rng.random() < SYSTEM
            else []
        )
        talks.append([*system, {"role": "user", "content": text}])
    rows = []
    with progress() as bar:
        task = bar.add_task("Answering", total=count, note="")
        for number, start in enumerate(range(0, count, BATCH)):
            part = talks[start : start + BATCH]
            answers = model.answers([model.prompt(talk) for talk in part], new_tokens, do_sample=number % 2 == 1)
            for talk, answer in zip(part, answers, strict=True):
                if answer.strip():
                    rows.append([*talk, {"role": "assistant", "content": answer}])
            bar.update(task, completed=start + len(part))
    write_rows(out, rows, "answers")


if __name__ == "__main__":
    main()
