"""Documents of RULER (arXiv 2404.06654), made and scored by lm-eval's own tasks."""

import importlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import numpy as np
from lm_eval.tasks import TaskManager

from lightning_memlong.config import require
from lightning_memlong.errors import UserError
from lightning_memlong.lm_eval.lm_eval_private import (
    GENERATORS,
    NEEDLES,
    Names,
    documents_made_with,
    fewer,
    impatient,
    offline,
    quiet,
    requests_of,
    swapped,
)
from lightning_memlong.text import tokenise

TASKS = {
    "niah_single_1": "niah_single_1", "niah_single_2": "niah_single_2", "niah_single_3": "niah_single_3",
    "niah_multikey_1": "niah_multikey_1", "niah_multikey_2": "niah_multikey_2", "niah_multikey_3": "niah_multikey_3",
    "niah_multivalue": "niah_multivalue", "niah_multiquery": "niah_multiquery", "vt": "ruler_vt", "cwe": "ruler_cwe",
    "fwe": "ruler_fwe", "qa_1": "ruler_qa_squad", "qa_2": "ruler_qa_hotpot",
}  # fmt: skip
"""RULER's names, and lm-eval's."""
ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
"""Those whose haystack is a text."""
QUESTIONS = {"qa_1": "squad", "qa_2": "hotpotqa"}
"""Those whose questions are data sets, and the option that has a file of them."""
SHORTEST = 1024
"""Tokens of a document, at least: some of lm-eval's functions never end where hardly more than the question fits."""


@dataclass(frozen=True)
class RulerSource:
    """What documents are made of."""

    tokenizer: Any
    seed: int
    haystack: str | None = None
    """A text file; None: Paul Graham's essays from the hub."""
    squad: str | None = None
    """A file of SQuAD's development set; None: from its address."""
    hotpotqa: str | None = None
    """Likewise of HotpotQA."""
    chat_template: Callable[..., str] | None = None
    """Writes messages as the backbone's template does; None: prompts are plain text."""


@dataclass(frozen=True)
class RulerDocument:
    """A document with its question, and what lm-eval makes of an answer."""

    task: str
    length: int
    sample: int
    prompt: str
    question: str
    """The last line of what is asked, with the beginning of the answer."""
    answers: tuple[str, ...]
    needles: tuple[str, ...]
    """What in the prompt says the answers, one each; none where that is all over it."""
    options: Mapping[str, Any]
    """How lm-eval wants the answer written."""
    score: Callable[[str], float]
    """Of an answer, from 0 to 1."""

    @property
    def answer(self) -> str:
        """What follows the prompt if it is answered rightly, as RULER's own examples write it."""
        if self.task == "cwe":
            return " " + " ".join(f"{number + 1}. {word}" for number, word in enumerate(self.answers))
        if self.task in QUESTIONS:  # each of them is one
            return " " + self.answers[0]
        return " " + (", " if self.task.startswith("niah") else " ").join(self.answers)


def make_documents(source: RulerSource, task: str, length: int, samples: int) -> list[RulerDocument]:
    """The first documents of a task and length; however many, the first ones are the same.

    Args:
        source: What they are made of.
        task: RULER's name.
        length: Tokens, with the answer [tokens].
        samples: How many.

    Raises:
        UserError: If they cannot be made.
    """
    states = random.getstate(), np.random.get_state()
    try:
        random.seed(source.seed)
        np.random.seed(source.seed)
        found = _task(source, task, length, samples)
    except UserError:
        raise
    except IndexError as error:
        if task not in QUESTIONS:
            raise
        raise UserError(
            f"evaluation.samples: {task} has not the {samples} questions that are asked or stand for a wrong answer. "
            "Allowed: fewer than it has. Fix: lower it."
        ) from error
    except OSError as error:  # those of requests and of the hub are among them
        raise _unreachable(task, error) from error
    except ValueError as error:
        raise _too_short(task, length, str(error)) from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    requests = requests_of(found, samples, source.chat_template)
    if len(requests) < samples:
        raise _too_short(task, length, f"{len(requests)} of {samples} documents fit")
    return [_document(found, task, length, n, request) for n, request in enumerate(requests)]


def _task(source: RulerSource, task: str, length: int, samples: int) -> Any:
    """lm-eval's task object, with its documents."""
    with impatient(), quiet(), documents_made_with(partial(_names, source, samples)):
        # Its own folder alone: all of lm-eval's take 20 seconds to list.
        folder = Path(lm_eval.tasks.__file__).parent / "ruler"
        metadata = {"max_seq_lengths": [length], "tokenizer": "ours"}
        manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
        return manager.load_task_or_group([TASKS[task]])[TASKS[task]]


def _document(made_by: Any, task: str, length: int, sample: int, request: Any) -> RulerDocument:
    prompt, options = request.args
    doc = request.doc
    answers = tuple(map(str, doc["outputs"]))

    def score(text: str) -> float:
        return float(made_by.process_results(doc, [text])[str(length)])

    question = f"{doc['input'].strip().splitlines()[-1]} {doc['gen_prefix']}".strip()
    return RulerDocument(task, length, sample, prompt, question, answers, _needles(task, answers), options, score)


def _needles(task: str, answers: Sequence[str]) -> tuple[str, ...]:
    if task.startswith("niah"):
        return tuple(f": {answer}." for answer in answers)
    return tuple(f"VAR {answer} =" for answer in answers) if task == "vt" else ()


def _names(source: RulerSource, samples: int, names: Names) -> Names:
    """What names of a module of RULER's mean while documents are made."""

    def tokens(text: str) -> Any:
        return tokenise(source.tokenizer, [text])[0]

    def count(text: str) -> int:
        return len(tokens(text))

    others: Names = {"get_tokenizer": lambda *_, **__: lambda text: SimpleNamespace(input_ids=tokens(text))}
    others |= {name: fewer(names, name, samples, count) for name in GENERATORS if name in names}
    if "RNG" in names:
        others["RNG"] = random.Random(source.seed)  # one that goes on from task to task
    if "get_haystack" in names:
        others["get_haystack"] = partial(_haystack, source.haystack)
    for read, file in (("read_squad", source.squad), ("read_hotpotqa", source.hotpotqa)):
        if read in names and file is not None:
            others[read] = partial(_questions, names, names[read].__wrapped__, file)
    return others


def _haystack(file: str | None, type_haystack: str) -> Any:
    """What RULER's own function gives, of another text."""
    needles = importlib.import_module(NEEDLES)
    if file is None or type_haystack != "essay":
        return needles.get_haystack(type_haystack)
    text = Path(file).read_text(errors="replace")
    here = SimpleNamespace(load_dataset=lambda *_, **__: {"text": [text]})
    with swapped(vars(needles), {"datasets": here}):
        return needles.get_haystack.__wrapped__(type_haystack)


def _questions(names: Names, read: Callable[[], Any], file: str) -> Any:
    """What RULER's own function gives, of a file."""
    try:
        with swapped(names, {"download_json": lambda _: json.loads(Path(file).read_text())}):
            return read()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be used ({type(error).__name__}: {error}). Allowed: the file of a development set, as its "
            "authors give it: dev-v2.0.json, hotpot_dev_distractor_v1.json. Fix: give that."
        ) from error


def _too_short(task: str, length: int, told: str) -> UserError:
    return UserError(
        f"evaluation.lengths={length!r} cannot be used for {task} ({' '.join(told.split()).rstrip('.')}). Allowed: "
        "lengths in which its words and its question fit. Fix: raise it, or leave the task out."
    )


def _unreachable(task: str, error: Exception) -> UserError:
    option = f"evaluation.{QUESTIONS.get(task, 'haystack')}"
    what = "a file of its questions" if task in QUESTIONS else "a text file"
    told = (" ".join(str(error).split()) or type(error).__name__)[:200]
    return UserError(f"{option}=None: {task} needs the network ({told}). Allowed: {what}. Fix: give --{option} FILE.")


def require_files(source: RulerSource, tasks: Sequence[str], longest: int) -> None:
    """Check the files of tasks before anything is made.

    Args:
        source: Names them.
        tasks: RULER's names.
        longest: Tokens of the longest document [tokens].

    Raises:
        UserError: If one is not there, is too short, or would have to be downloaded where nothing may be.
    """
    for task in tasks:
        key, file = _file_of(source, task)
        if key is None:
            continue
        if file is None and task in ESSAYS:
            _load_essays(task)
            continue
        if file is None:
            require(not offline(), key, None, f"a file: {task} would download it, and we are offline", "give one")
            continue
        require(Path(file).is_file(), key, file, "a file that is there", "correct the path")
        if task in ESSAYS:
            tokens = len(tokenise(source.tokenizer, [Path(file).read_text(errors="replace")], control=False)[0])
            found, allowed = f"{file}, {tokens} tokens", f"at least as many as the longest document, {longest} tokens"
            require(tokens >= longest, key, found, allowed, "give a longer text, or lower evaluation.lengths")


def _load_essays(task: str) -> None:
    """Have lm-eval load the essays; it keeps them."""
    try:
        with impatient():
            importlib.import_module(NEEDLES).get_haystack("essay")
    except OSError as error:
        raise _unreachable(task, error) from error


def _file_of(source: RulerSource, task: str) -> tuple[str | None, str | None]:
    """The option of the file a task is made of, and the file; None, None: it needs none."""
    if task in QUESTIONS:
        return f"evaluation.{QUESTIONS[task]}", getattr(source, QUESTIONS[task])
    return ("evaluation.haystack", source.haystack) if task in ESSAYS else (None, None)
