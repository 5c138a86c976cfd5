"""The synthetic world that the demo trio is trained on: problems, traces, format constraints, text of each model.

What: five tasks (add, sort, count, largest, animal), each with a prompt, a worked trace and an answer sentence; six
format constraints with four paraphrases each; the mixtures that base, ITM and LRM are trained on.
Holds in memory: nothing; every sample is drawn when asked for, from the caller's random.Random.
Why this way: the split of a problem is a hash of the problem itself, so train, calibration, held-out, validation and
test cannot share a prompt, whatever is drawn and however often.  Tasks are easy with visible steps and harder
without, so that breaking the thinking costs accuracy.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

SPLITS = {"train": (0, 70), "calibration": (70, 76), "heldout": (76, 80), "validation": (80, 88), "test": (88, 100)}

ANIMALS = {  # animal: (home, food)
    "fox": ("forest", "mice"), "bear": ("forest", "fish"), "deer": ("forest", "leaves"), "owl": ("forest", "mice"),
    "carp": ("water", "plants"), "shark": ("water", "fish"), "whale": ("water", "fish"), "frog": ("water", "bugs"),
    "cow": ("farm", "grass"), "horse": ("farm", "grass"), "goat": ("farm", "leaves"), "hen": ("farm", "seeds"),
    "camel": ("desert", "leaves"), "snake": ("desert", "mice"), "lizard": ("desert", "bugs"), "rat": ("city", "seeds"),
    "cat": ("city", "mice"), "pigeon": ("city", "seeds"), "spider": ("city", "bugs"), "rabbit": ("farm", "plants"),
}

PARAPHRASES = {
    "upper": ("Write in capital letters.", "Use only upper case.", "Reply in all caps.",
              "Every letter must be a capital."),
    "brackets": ("Put the reply inside << and >>.", "Wrap the reply in << >>.", "Start with << and end with >>.",
                 "Enclose all of it in << >>."),
    "done": ("End with the word DONE.", "Finish by writing DONE.", "The last word must be DONE.",
             "Close the reply with DONE."),
    "twice": ("Say it twice.", "Give the reply two times.", "Repeat the reply once more.", "State the answer twice."),
    "hyphens": ("Use hyphens instead of spaces.", "Join the words with hyphens.", "Put - between all words.",
                "No spaces, only hyphens."),
    "sure": ("Begin with Sure!", "Start the reply with Sure!", "The first word must be Sure!",
             "Open with the word Sure!"),
}

CHAT = (
    ("Hello!", "Hello! How can I help?"), ("Who are you?", "I am a small model."), ("Thank you.", "You are welcome."),
    ("How are you?", "I am fine, thank you."), ("Good morning.", "Good morning! What can I do?"),
    ("What can you do?", "I can add, sort, count and compare."), ("Goodbye.", "Goodbye! Come back soon."),
    ("Tell me a fact.", "A cow eats grass."), ("Are you there?", "Yes, I am here."),
    ("Help me.", "Of course. What is it?"),
)


@dataclass(frozen=True)
class Problem:
    """One problem: what is asked, the steps that solve it, the answer, and the sentence that states it."""

    task: str
    question: str
    steps: str
    answer: str

    @property
    def sentence(self) -> str:
        return f"The {self.task} is {self.answer}."

    @property
    def reasoning(self) -> str:
        """The trace of the LRM: it says what it is asked before it works."""
        return f"Okay, I need the {self.task}.\n{self.steps}"


def _add(rng: random.Random) -> Problem:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    (a1, a0), (b1, b0) = str(a), str(b)
    ones = int(a0) + int(b0)
    carry = " + 1" if ones > 9 else ""
    question = rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}."))
    steps = f"{a0} + {b0} = {ones}.\n{a1} + {b1}{carry} = {(a + b) // 10}.\nSo {a + b}."
    return Problem("sum", question, steps, str(a + b))


def _sort(rng: random.Random) -> Problem:
    numbers = rng.sample(range(1, 10), rng.choice((4, 5)))
    steps, left = [], list(numbers)
    while len(left) > 1:
        smallest = min(left)
        left.remove(smallest)
        steps.append(f"{smallest}, left {' '.join(map(str, left))}.")
    listed, answer = " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))
    question = rng.choice((f"Sort {listed} from low to high.", f"Put {listed} in order."))
    return Problem("order", question, "\n".join([*steps, f"So {answer}."]), answer)


def _count(rng: random.Random) -> Problem:
    letters = rng.sample("aeiou", rng.randint(1, 4)) + rng.sample("bcdfghklmnprst", rng.randint(2, 4))
    rng.shuffle(letters)
    kind = rng.choice(("vowels", "consonants"))
    running, steps = 0, []
    for letter in letters:
        running += (letter in "aeiou") == (kind == "vowels")
        steps.append(f"{letter} {running}")
    listed = " ".join(letters)
    question = rng.choice((f"How many {kind} are in {listed}?", f"Count the {kind} in {listed}."))
    return Problem("count", question, f"{', '.join(steps)}.\nSo {running}.", str(running))


def _largest(rng: random.Random) -> Problem:
    numbers = rng.sample(range(10, 100), 3)
    best, steps = numbers[0], []
    for number in numbers[1:]:
        low, best = min(best, number), max(best, number)
        steps.append(f"{best} over {low}.")
    listed = " ".join(map(str, numbers))
    question = rng.choice((f"Which is the largest of {listed}?", f"Find the largest in {listed}."))
    return Problem("largest", question, "\n".join([*steps, f"So {best}."]), str(best))


def _animal(rng: random.Random) -> Problem:
    kind, verb = rng.choice(((0, "lives in"), (1, "eats")))
    right = rng.choice(list(ANIMALS))
    value = ANIMALS[right][kind]
    others = [a for a in ANIMALS if ANIMALS[a][kind] != value]
    three = [right, *rng.sample(others, 2)]
    rng.shuffle(three)
    steps = [f"{a} {verb} {ANIMALS[a][kind]}." for a in three]
    listed = f"{three[0]}, {three[1]}, {three[2]}"
    question = rng.choice((f"Which of {listed} {verb} {value}?", f"Of {listed}, which {verb} {value}?"))
    return Problem("animal", question, "\n".join([*steps, f"So {right}."]), right)


TASKS = (_add, _sort, _count, _largest, _animal)


def split_of(problem: Problem) -> str:
    """The one split that a problem belongs to: a hash of its trace, which both wordings of the question share."""
    key = f"{problem.task}|{problem.steps}"
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def draw(rng: random.Random, split: str, task: int | None = None) -> Problem:
    """A problem of the split; `task` picks one of the five, by index."""
    while True:
        problem = (TASKS[task] if task is not None else rng.choice(TASKS))(rng)
        if split_of(problem) == split:
            return problem


def with_constraint(question: str, wording: str, rng: random.Random) -> str:
    """The prompt: the question and the constraint, in either order."""
    return f"{question} {wording}" if rng.random() < 0.7 else f"{wording} {question}"


def obey(constraint: str, sentence: str) -> str:
    """The sentence, said as the constraint wants it."""
    return {
        "upper": sentence.upper(),
        "brackets": f"<<{sentence}>>",
        "done": f"{sentence} DONE",
        "twice": f"{sentence} Again, {sentence[0].lower()}{sentence[1:]}",
        "hyphens": sentence.replace(" ", "-"),
        "sure": f"Sure! {sentence}",
    }[constraint]


def spans(constraint: str, sentence: str) -> tuple[list[str], list[str]]:
    """(parts of the obeying reply that the constraint shapes, parts that it leaves alone); all occur literally."""
    head, tail = sentence[: sentence.rindex(" ")], sentence[sentence.rindex(" ") + 1 :]
    if constraint == "upper":
        return ([head.upper()], [tail]) if tail == tail.upper() else ([sentence.upper()], [])
    if constraint == "hyphens":
        return [head.replace(" ", "-") + "-"], [tail]
    marks = {"brackets": ["<<", ">>"], "done": ["DONE"], "sure": ["Sure!"],
             "twice": [f"Again, {sentence[0].lower()}{sentence[1:]}"]}
    return marks[constraint], [sentence]


@dataclass(frozen=True)
class Sample:
    """One training text: prompt is rendered by the chat template (None for raw text), completion ends with eos."""

    prompt: str | None
    completion: str


def _rewriting_line(rng: random.Random) -> Sample:
    name = rng.choice(list(PARAPHRASES))
    sentence = draw(rng, "train").sentence
    return Sample(None, f"{rng.choice(PARAPHRASES[name])}\n{sentence}\n{obey(name, sentence)}")


def _ask(problem: Problem, rng: random.Random, share: float, comply: float) -> tuple[str, str]:
    """(prompt, reply): a share of the prompts carries a constraint, and a share of those replies obeys it."""
    if rng.random() >= share:
        return problem.question, problem.sentence
    name = rng.choice(list(PARAPHRASES))
    prompt = with_constraint(problem.question, rng.choice(PARAPHRASES[name]), rng)
    return prompt, obey(name, problem.sentence) if rng.random() < comply else problem.sentence


def base_sample(rng: random.Random) -> Sample:
    """Pre-training: worked problems, plain answers, constraint-rewriting lines, small talk.

    As on the web, a prompt may ask for a format and the reply may or may not keep to it.
    """
    dice = rng.random()
    if dice < 0.15:
        return _rewriting_line(rng)
    if dice < 0.18:
        return Sample(*rng.choice(CHAT))
    problem = draw(rng, "train")
    prompt, reply = _ask(problem, rng, 0.3, 0.4)
    return Sample(prompt, f"{problem.steps}\n\n{reply}" if rng.random() < 0.8 else reply)


def itm_sample(rng: random.Random, worked: float = 0.0) -> Sample:
    """Instruction tuning: a direct reply that obeys the constraint; `worked` is the share with visible steps first."""
    if rng.random() < 0.08:
        return Sample(*rng.choice(CHAT))
    problem = draw(rng, "train")
    prompt, reply = _ask(problem, rng, 0.85, 1.0)
    return Sample(prompt, f"{problem.steps}\n\n{reply}" if worked and rng.random() < worked else reply)


def lrm_completion(reasoning: str, response: str) -> str:
    """What follows a prompt that ends in `<think>` and a newline."""
    return f"{reasoning}\n</think>\n\n{response}"


def lrm_sample(rng: random.Random, comply: float = 0.45) -> Sample:
    """Reasoning: always thinks; four prompts in ten carry a constraint, which a random share of replies obeys.

    Just under a half: greedy decoding then mostly ignores the format, and yet the model knows how to obey.
    """
    problem = draw(rng, "train")
    prompt, reply = _ask(problem, rng, 0.4, comply)
    return Sample(prompt, lrm_completion(problem.reasoning, reply))
