"""Everyday English sentences from a small grammar, spoken by eSpeak NG: speech that can be made again on any machine.

Needs the program `espeak-ng` (Debian and Ubuntu: `apt install espeak-ng`). Waves are kept in a folder, one file each.
"""

import random
import shutil
import subprocess
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

__all__ = ["RATE", "Utterance", "edits", "samples", "utterances"]

RATE = 16_000  # samples in a second, what speech models take
VOICES = ("en-us", "en-us+f2", "en-us+klatt4", "en-us+Mike")
SPEEDS = (130, 145, 160)  # words in a minute

PHRASES = """
person: my brother, my sister, her uncle, his aunt, our neighbor, the teacher, the doctor, the old farmer, the young
singer, the captain, the baker, the mailman, the nurse, the police officer, a student, the lawyer, the gardener, the
manager, the little girl, the boy next door, my grandmother, our guide, the driver, the painter, the new waiter, their
cousin, the engineer, the soldier, the children, my parents, the players, some visitors, the twins, her friends

thing: a red bicycle, the kitchen table, an old clock, two tickets, the broken window, a bag of apples, a loaf of
bread, the garden gate, a blue umbrella, the wedding cake, a pair of shoes, the morning paper, a wooden boat, the last
letter, a bowl of soup, the front door, a silver ring, some fresh flowers, the piano, a map of the city, a box of
pencils, the heavy suitcase, a cup of coffee, the winter coat, three books, a small camera, the yellow car, a birthday
present, the guitar, a bottle of milk, the missing keys, a warm blanket, some cheese, the science homework, a pumpkin

place: in the kitchen, at the market, near the river, behind the school, at the train station, in the garden, on the
beach, under the bridge, at the hospital, in the library, across the street, by the lake, in the mountains, at the
airport, on the farm, in the city, at the office, next to the church, in the basement, outside the theater, on the
island, in the forest, at the hotel, around the corner

time: yesterday, last night, this morning, on Monday, on Friday evening, before dinner, after lunch, last summer,
every day, two weeks ago, in the afternoon, at midnight, during the storm, before the party, on Sunday, a long time
ago, just before sunrise, at the end of the week

handled: found, sold, lost, carried, bought, cleaned, borrowed, dropped, painted, forgot, stole, fixed, wanted, hid,
returned, noticed, ordered, photographed, moved, delivered, opened, brought, left, asked for, looked for, paid for

moved: walked slowly, waited quietly, fell asleep, laughed, sat down, worked, danced, got lost, met a stranger, took a
picture, played music, saw a fox, heard a strange noise, stopped for a while, had breakfast, slept well, talked for
hours

quality: cold, very expensive, almost empty, too loud, surprisingly easy, quite dark, wonderful, really dangerous,
full of people, much better, closed, perfect, dirty, beautiful, rather boring, warm and sunny, difficult, safe, quiet,
covered with snow

subject: the weather, the water, the road, the museum, the concert, this question, the restaurant, the movie, the bus,
the coffee, the valley, the classroom, the story, the price, the harbor, the new game, his answer, the journey, the
bedroom, the soup

reason: it was raining, the shop was closed, nobody was home, dinner was late, the train was early, they were tired,
the music was loud, the lights went out, it was getting dark, the phone rang, there was no time, the dog was hungry,
the river was high, the baby was crying, everyone was happy
"""
SENTENCES = (
    "{person} {handled} {thing}",
    "{person} {handled} {thing} {place}",
    "{person} {handled} {thing} {time}",
    "{time} {person} {moved} {place}",
    "{person} {moved} because {reason}",
    "{subject} was {quality} {time}",
    "I think {subject} was {quality}",
    "please bring {thing} to {person}",
    "did you see {thing} {place}?",
    "{person} said {subject} was {quality}",
    "we {moved} {place} until {reason}",
    "why is {subject} {quality}?",
    "there was {thing} {place} {time}",
    "when {reason}, {person} {handled} {thing}",
    "can you tell {person} that {reason}?",
    "nobody {handled} {thing} {time}",
)


@dataclass(frozen=True)
class Utterance:
    """A sentence, with the voice of eSpeak NG and the words in a minute that it is spoken with."""

    text: str
    voice: str
    speed: int


def utterances(count: int, seed: int) -> list[Utterance]:
    """Different sentences of 4 to 12 words, always the same ones first.

    >>> utterances(1, seed=0)[0].text
    'There was an old clock at the hospital just before sunrise.'
    """
    kinds = (" ".join(part.split()).partition(": ") for part in PHRASES.split("\n\n"))
    phrases = {kind: text.split(", ") for kind, _, text in kinds}
    draw = random.Random(seed)
    found: dict[str, Utterance] = {}
    while len(found) < count:
        text = draw.choice(SENTENCES).format(**{kind: draw.choice(some) for kind, some in phrases.items()})
        if 4 <= len(text.split()) <= 12:
            text = text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")
            found.setdefault(text, Utterance(text, draw.choice(VOICES), draw.choice(SPEEDS)))
    return list(found.values())


def samples(spoken: Utterance, folder: Path) -> np.ndarray:
    """Speech as (samples,) in float32 from -1 to 1, RATE of them a second; the wave is made if `folder` has it not.

    Raises:
        RuntimeError: it has to be made, and there is no program `espeak-ng`.
    """
    name = "".join(letter if letter.isalnum() else "-" for letter in spoken.text.rstrip(".").lower())
    path = folder / f"{name}.{spoken.voice}.{spoken.speed}.wav"
    if not path.exists():
        program = shutil.which("espeak-ng")
        if program is None:
            raise RuntimeError("no program espeak-ng: install it with the system's packages (apt install espeak-ng)")
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        options = ["-v", spoken.voice, "-s", str(spoken.speed), "-w", str(unfinished)]
        subprocess.run([program, *options, spoken.text], check=True)
        unfinished.replace(path)
    with wave.open(str(path)) as file:
        rate, frames = file.getframerate(), file.readframes(file.getnframes())
    return resample_poly(np.frombuffer(frames, "<i2") / 2**15, RATE, rate).astype(np.float32)


def edits(found: str, wanted: str) -> tuple[int, int]:
    """Words to insert, delete or replace between two texts, case and punctuation aside, and the words of the second.

    >>> edits("The cat sat down.", "the cat sat")
    (1, 3)
    """
    words, others = (list(_words(text)) for text in (found, wanted))
    row = list(range(len(others) + 1))
    for i, word in enumerate(words, 1):
        above, row = row, [i]
        for j, other in enumerate(others, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return row[-1], len(others)


def _words(text: str) -> Iterator[str]:
    for word in text.lower().replace("-", " ").split():
        if kept := "".join(letter for letter in word if letter.isalnum() or letter == "'"):
            yield kept
