"""Contrasting texts: sets of ours, in our own words, or a user's file; divided into parts that share nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.row_files import file_rows
from lightning_interp.errors import DataError, RecipeError

# One line an item: prompt | ending that shows the behaviour | ending that shows its opposite.
_MOOD = """
The weekend at the lake was|wonderful, and we laughed all day.|dreadful, and we argued all day.
When she opened the letter, she felt|delighted and full of hope.|crushed and full of fear.
Our new neighbours are|charming and always glad to help.|rude and never willing to help.
The food at the small cafe tasted|fresh, rich and delicious.|stale, bland and disgusting.
After the long journey, he was|happy to be home at last.|miserable and in pain.
The concert last night was|brilliant from the first note to the last.|awful from the first note to the last.
My first day at work went|better than I had dreamed.|worse than I had feared.
The garden behind the house looks|lovely in the morning sun.|ugly and neglected in the rain.
I think the future will be|bright for all of us.|bleak for all of us.
The children came back from school|smiling and singing.|crying and shouting.
Her speech at the wedding was|warm, funny and moving.|cold, dull and embarrassing.
The film we saw on Friday was|a joy to watch.|a waste of time.
That summer I felt|free and deeply content.|trapped and deeply lonely.
The doctor brought us|good news, and we cheered.|bad news, and we wept.
Working with this team is|a pleasure every single day.|a nightmare every single day.
The hotel room was|clean, bright and comfortable.|dirty, dark and uncomfortable.
His answer made everyone|smile with relief.|groan with disappointment.
The old dog greeted us with|a happy bark and a wagging tail.|an angry growl and bared teeth.
The results of the test were|excellent, and I was proud.|terrible, and I was ashamed.
Christmas at my aunt's house is|the best day of the year.|the worst day of the year.
The weather on our trip was|perfect, warm and sunny.|horrible, cold and wet.
Looking back on that year, I feel|grateful for everything.|bitter about everything.
The boss called me in and|praised my good work.|blamed me for everything.
The view from the window is|breathtaking and peaceful.|depressing and grim.
The baby woke up|cheerful and ready to play.|screaming and sick.
Our team played|superbly and won with ease.|poorly and lost badly.
The book that you lent me was|fascinating, and I loved it.|tedious, and I hated it.
On my birthday my friends|threw me a wonderful party.|forgot all about me.
The train ride through the hills was|relaxing and beautiful.|exhausting and unpleasant.
The service in the shop was|friendly, quick and kind.|hostile, slow and careless.
Talking to my sister always|lifts my spirits.|ruins my mood.
The house we bought turned out to be|a dream come true.|a costly disaster.
The news this morning was|encouraging and hopeful.|alarming and sad.
At the end of the evening everyone was|glad and in high spirits.|gloomy and in a foul temper.
The cake that he baked was|a delicious success.|a burnt failure.
Living by the sea makes me|calm and joyful.|anxious and sad.
"""

_FORMAL = """
About the meeting tomorrow:|I regret to inform you that I shall be unable to attend.|yeah sorry, can't make it.
Regarding your question,|we would be pleased to provide further information.|sure, just hit me up anytime.
The results of the project|were presented to the committee for consideration.|are totally awesome, check it out.
In reply to your message,|please accept my sincere apologies for the delay.|oops, my bad, totally forgot.
The new policy|shall take effect on the first day of the month.|kicks in on the first, so heads up.
For the report,|it is recommended that the figures be examined with care.|you gotta double-check the numbers.
As for the party,|we cordially request the honour of your presence.|come hang out, it's gonna be fun.
The applicant|demonstrated considerable expertise in the field.|really knows her stuff.
Concerning the payment,|the outstanding amount must be remitted without delay.|you still owe us some cash, man.
The experiment|did not yield the anticipated outcome.|kinda flopped.
With respect to the contract,|both parties are obliged to observe its provisions.|everybody's gotta stick to the deal.
The speaker|expressed profound gratitude to the audience.|was like, thanks a bunch, guys.
To the manager:|I wish to express my dissatisfaction with the service.|this place is kinda lousy, dude.
The professor|elaborated upon the implications of the theory.|went on and on about that idea.
At your earliest convenience,|kindly return the enclosed documents.|just send the stuff back, okay?
The building|was constructed in accordance with the regulations.|got put up by the book.
After lunch,|the participants proceeded to the conference hall.|we all headed back inside.
The price|has been increased owing to rising expenditure.|went up a bunch, no joke.
The book|provides a comprehensive account of the period.|is a pretty cool read.
In our opinion,|further investigation would be advisable.|let's dig into it some more.
The car|requires immediate attention from a qualified mechanic.|is busted, get it fixed.
The committee|resolved to postpone its decision.|figured they'd deal with it later.
The children|conducted themselves in an exemplary manner.|were super good.
The journey|was undertaken at considerable expense.|cost us a ton.
My colleague|is presently unavailable.|isn't around right now.
The letter|was received with great appreciation.|made us super happy.
Our guests|are respectfully requested to remain seated.|should just chill in their seats.
The company|endeavours to satisfy its customers.|tries to keep folks happy.
The weather|prevented us from continuing our excursion.|messed up our trip big time.
Her proposal|merits thorough consideration.|sounds pretty good to me.
The patient|was advised to refrain from physical exertion.|was told to take it easy.
His arrival|was awaited with great anticipation.|had us all pumped.
The student|failed to comprehend the instructions.|just didn't get it.
The minister|declined to comment upon the matter.|wouldn't say a thing.
Their argument|is founded upon insufficient evidence.|is kind of a stretch.
The restaurant|offers an exceptional selection of dishes.|has tons of great food.
"""

_PAST = """
The farmer|walked to the market and sold his apples.|walks to the market and sells his apples.
My grandmother|lived by the river and kept six goats.|lives by the river and keeps six goats.
The ship|left the harbour and sailed to the north.|leaves the harbour and sails to the north.
Every morning the baker|rose early and baked the bread.|rises early and bakes the bread.
The river|flowed through the town and turned the mill.|flows through the town and turns the mill.
Two boys|ran across the field and jumped the fence.|run across the field and jump the fence.
The teacher|wrote a sum on the board and asked for the answer.|writes a sum on the board and asks for the answer.
The cat|slept in the sun and woke at noon.|sleeps in the sun and wakes at noon.
Our team|trained hard and won the cup.|trains hard and wins the cup.
The old clock|struck twelve and then stopped.|strikes twelve and then stops.
She|opened the window and looked at the stars.|opens the window and looks at the stars.
The king|ruled wisely and built new roads.|rules wisely and builds new roads.
A stranger|came to the door and asked for water.|comes to the door and asks for water.
The doctor|examined the boy and gave him medicine.|examines the boy and gives him medicine.
They|sang a song and danced around the fire.|sing a song and dance around the fire.
The wind|blew from the west and brought the rain.|blows from the west and brings the rain.
The painter|chose a brush and drew a thin line.|chooses a brush and draws a thin line.
My brother|drove a truck and knew every road.|drives a truck and knows every road.
The bird|built a nest and laid four eggs.|builds a nest and lays four eggs.
The soldiers|marched to the bridge and waited.|march to the bridge and wait.
Their mother|cooked a soup and told them a story.|cooks a soup and tells them a story.
The train|stopped at the station and let us off.|stops at the station and lets us off.
The judge|heard both sides and made a decision.|hears both sides and makes a decision.
The girl|found a coin and bought some bread.|finds a coin and buys some bread.
The company|grew quickly and hired more people.|grows quickly and hires more people.
The snow|fell all night and covered the road.|falls all night and covers the road.
We|took the bus and met them at the gate.|take the bus and meet them at the gate.
The hunter|saw a deer and stood still.|sees a deer and stands still.
The shop|sold old books and closed at six.|sells old books and closes at six.
The scientist|measured the heat and noted the number.|measures the heat and notes the number.
He|put on his coat and went out.|puts on his coat and goes out.
The church bell|rang loudly and everyone heard it.|rings loudly and everyone hears it.
The dog|chased the ball and brought it back.|chases the ball and brings it back.
The students|read the book and discussed it.|read the book now and discuss it.
A light|shone in the tower and went out again.|shines in the tower and goes out again.
The actor|forgot his lines and laughed.|forgets his lines and laughs.
"""

NEUTRAL: tuple[str, ...] = (
    "Water boils at one hundred degrees at sea level, and at a lower temperature in the mountains.",
    "The recipe needs two cups of flour, one egg, a little salt and half a cup of milk.",
    "A triangle has three sides, and its angles add up to one hundred and eighty degrees.",
    "The library is open from nine to five on weekdays and from ten to two on Saturdays.",
    "Most of the planet is covered by water, and most of that water is salty.",
    "To change a tyre, loosen the nuts first, then lift the car and take the wheel off.",
    "The bus to the airport stops in front of the station every twenty minutes.",
    "Paper is made from wood, which is cut into chips, boiled, and pressed into sheets.",
)
"""Texts about nothing in particular, to see what steering does to the rest of a model's behaviour."""

OPENINGS: tuple[str, ...] = (
    "Yesterday evening",
    "The people in this town",
    "When I think about my job,",
    "Dear Anna,",
    "The first thing to know about the museum is that",
    "My brother and I",
)
"""Prompts that leave open how they go on."""


def _rows(table: str) -> tuple[dict[str, str], ...]:
    lines = (line.split("|") for line in table.strip().splitlines())
    return tuple({"prompt": prompt, "positive": f" {one}", "negative": f" {other}"} for prompt, one, other in lines)


SETS: dict[str, tuple[dict[str, str], ...]] = {"mood": _rows(_MOOD), "formal": _rows(_FORMAL), "past": _rows(_PAST)}
"""Items by behaviour: positive against negative mood, formal against casual wording, past against present tense."""

_KEYS = ("prompt", "positive", "negative")
_FEWEST = 6


@dataclass(frozen=True)
class ContrastItem:
    """A prompt with two endings.

    Args:
        positive: The ending that shows the behaviour.
        negative: The one that shows its opposite.
        prompt: What both begin with; may be empty.
    """

    positive: str
    negative: str
    prompt: str = ""

    @property
    def texts(self) -> tuple[str, str]:
        """Both texts in full, the positive one first."""
        return self.prompt + self.positive, self.prompt + self.negative


@dataclass(frozen=True)
class ContrastSplit:
    """Three parts without a common item: to make a vector, to choose how to use it, and to report what it does."""

    train: tuple[ContrastItem, ...]
    choose: tuple[ContrastItem, ...]
    report: tuple[ContrastItem, ...]


def read_contrasts(source: str) -> list[ContrastItem]:
    """Items of one of our sets, or of a user's file.

    Args:
        source: ``mood``, ``formal`` or ``past``; or a JSONL file with ``positive`` and ``negative``, and if wished
            ``prompt``, in each line.

    Returns:
        The items.

    Raises:
        RecipeError: If there is no such set and no such file.
        DataError: With file and line, if one holds something else.

    Example:
        >>> read_contrasts("past")[0].texts[0]
        'The farmer walked to the market and sold his apples.'
    """
    if source in SETS:
        return [ContrastItem(**row) for row in SETS[source]]
    path = Path(source)
    if not path.is_file():
        raise RecipeError(
            f"There is no contrast set {source!r}. Name one of {', '.join(SETS)}, or a JSONL file with 'positive' and "
            "'negative' in each line."
        )
    expected = "one object a row with 'positive' and 'negative'"
    return [_item(row, where) for where, row in file_rows(path, expected=expected)]


def split_contrasts(items: Sequence[ContrastItem], *, seed: int) -> ContrastSplit:
    """Half of the items to make a vector, a quarter to choose with, the rest to report; in a seeded order.

    Args:
        items: At least six.
        seed: Root seed.

    Returns:
        The parts.

    Raises:
        DataError: If there are fewer.

    Example:
        >>> parts = split_contrasts(read_contrasts("mood"), seed=0)
        >>> len(parts.train), len(parts.choose), len(parts.report)
        (18, 9, 9)
    """
    if len(items) < _FEWEST:
        raise DataError(f"There are {len(items)} contrast items, too few to divide; give at least {_FEWEST}.")
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(derived_seed(seed, "contrasts")))
    mixed = [items[i] for i in order.tolist()]
    half, quarter = len(mixed) // 2, len(mixed) // 4
    return ContrastSplit(tuple(mixed[:half]), tuple(mixed[half : half + quarter]), tuple(mixed[half + quarter :]))


def _item(row: dict[str, Any], where: str) -> ContrastItem:
    for key, value in row.items():
        if key not in _KEYS or not isinstance(value, str):
            raise DataError(f"{where}: {key!r} is {value!r:.60}; expected strings under {', '.join(_KEYS)}.")
    for key in ("positive", "negative"):
        if not row.get(key, "").strip():
            raise DataError(f"{where}: {key!r} is missing or empty.")
    if row["positive"] == row["negative"]:
        raise DataError(f"{where}: 'positive' and 'negative' are both {row['positive']!r:.60}; expected a contrast.")
    return ContrastItem(**row)
