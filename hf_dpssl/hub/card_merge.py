"""A model card with a generated part between two marks, and what a person wrote around it.

The begin mark holds digests of the front matter as it was generated, so that the next generation tells a value that a
person has changed (his is kept) from one that is only old (it is replaced). A round trip through ruamel.yaml would keep
comments too, but not text byte by byte, and which lines are a person's would be asked here all the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from ..runs.console import one_line

_NAME = "hf_dpssl:generated"
_MARK = re.compile(rf"^[ \t]*<!-- {_NAME}:(begin|end)\b(.*?)-->[ \t]*$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_KEY = re.compile(r"""["']?([^\s"'#:-][^"':]*)["']?[ ]*:(?:\s|$)""")
_MODEL_INDEX = "model-index"


def marked_card(front_matter: dict, text: str, *, given: Iterable[str] = ()) -> str:
    """A whole card: front matter, and `text` between the marks that `merge_card` looks for.

    Args:
        front_matter: plain values by key, "model-index" as huggingface_hub writes it.
        text: Markdown.
        given: keys whose values are a person's already, and kept by the next merge.
    """
    generated = {key: value for key, value in front_matter.items() if key not in given}
    digests = " ".join(f"{key}={','.join(map(_digest, _items(key, value)))}" for key, value in generated.items())
    begin = f"<!-- {_NAME}:begin (what stands between the marks is overwritten by `hf-dpssl card`) {digests} -->"
    end = f"<!-- {_NAME}:end (what stands outside of the marks is yours and is kept) -->"
    text = text.replace(_NAME, _NAME.replace(":", "&#58;"))  # a name of data that holds a mark is none
    return f"---\n{_dump(front_matter)}---\n\n{begin}\n\n{text.strip()}\n\n{end}\n"


def merge_card(existing: str, generated: str) -> str:
    """The card `existing` with its generated part replaced by that of `generated`; what a person wrote is kept.

    Text outside the marks stays as it is. A card without marks is a person's: the generated part is put below it. Of
    the front matter,
      - keys that were never generated (`language`, `license_link`, ...) stay;
      - a generated value that a person has changed or removed (`license`, `pipeline_tag`, ...) stays as he left it; one
        that he has not touched is replaced;
      - lists (`tags`, `datasets`, `base_model`) and the results of `model-index` are the generated items, then those
        that he has added. A generated figure replaces his of the same measurement.
    Comments of the front matter and CRLF line ends stay. Merging twice is merging once.

    Args:
        existing: README.md as it is; "" where there is none.
        generated: what `marked_card` returns.

    Raises:
        ValueError: marks that are damaged (one lacks, twice, wrong order), or front matter that cannot be read: nothing
            is guessed, the message says how to mend it.
    """
    if not existing.strip():
        return generated
    crlf = "\r\n" in existing
    existing = existing.removeprefix("\ufeff").replace("\r\n", "\n")
    theirs, written, text = _split(existing, "the present card")
    ours, _, our_text = _split(generated, "the generated card")
    begin, end = _marks(our_text, "the generated card")
    part = our_text[begin.start() : end.end()]
    found = _marks(text, "README.md") if _NAME in text else None
    if found is None:
        text, digests = f"{text.rstrip()}\n\n{part}\n".lstrip("\n"), {}
    else:
        text, digests = text[: found[0].start()] + part + text[found[1].end() :], _digests(found[0][2])
    values = _merged(theirs, ours, digests)
    merged = f"---\n{_rewritten(written, theirs, values)}---\n{'' if text.startswith(chr(10)) else chr(10)}{text}"
    return merged.replace("\n", "\r\n") if crlf else merged


def pushed_card(existing: str, own: str) -> str:
    """The card that a push puts in place of `existing`, which the Hub has, for the `own` one of a folder.

    A generated one is merged (`merge_card`). One without marks is a person's, and is published as it is.

    Raises:
        ValueError: as `merge_card`; or the Hub's card is a generated one, which a card without marks would replace.
    """
    if _NAME in own:
        return merge_card(existing, own)
    if _NAME in existing:
        raise ValueError(
            "README.md on the Hub holds a generated part and that of the folder has none, so that it would be lost: "
            "write it below your text with `hf-dpssl card FOLDER`, or delete README.md on the Hub; then push again."
        )
    return own


def add_results(card: str, title: str, results: list[EvalResult]) -> str:
    """A card with these results in its model-index, in place of earlier ones of the same measurement.

    Args:
        card: README.md as it is; "" where there is none.
        title: of the model, where the index has none yet.
        results: to be added; the next `merge_card` takes them for a person's, and keeps them.

    Raises:
        ValueError: front matter that cannot be read.
    """

    def change(values: dict) -> dict:
        name, present = _results(values[_MODEL_INDEX]) if values.get(_MODEL_INDEX) else (title, [])
        kept = [result for result in present if not any(result.is_equal_except_value(other) for other in results)]
        return values | {_MODEL_INDEX: eval_results_to_model_index(name, kept + results)}

    return _with_front_matter(card, change)


def with_entries(card: str, entries: dict, keys: Iterable[str]) -> str:
    """A card whose front matter has these entries, and of `keys` no others; ValueError for one that cannot be read."""
    return _with_front_matter(
        card, lambda values: {key: value for key, value in values.items() if key not in keys} | entries
    )


def _with_front_matter(card: str, change: Callable[[dict], dict]) -> str:
    crlf = "\r\n" in card
    values, written, text = _split(card.removeprefix("\ufeff").replace("\r\n", "\n"), "the present card")
    card = f"---\n{_rewritten(written, values, change(values))}---\n{'' if text.startswith(chr(10)) else chr(10)}{text}"
    return card.replace("\n", "\r\n") if crlf else card


def _split(card: str, what: str) -> tuple[dict, str, str]:
    """Front matter as values and as written, and the text after it."""
    match = _FRONT_MATTER.match(card)
    if match is None:
        return {}, "", card
    try:
        values = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the front matter of {what} is no YAML ({one_line(error)}): mend it, or remove it.") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"the front matter of {what} must be keys with values, not a {type(values).__name__}: mend it."
        )
    return values, match[1], card[match.end() :]


def _marks(text: str, what: str) -> tuple[re.Match, re.Match]:
    found = list(_MARK.finditer(text))
    if [match[1] for match in found] != ["begin", "end"] or text.count(_NAME) != 2:
        raise ValueError(
            f"{what} must have the lines '<!-- {_NAME}:begin ... -->' and '<!-- {_NAME}:end ... -->' once each and in "
            f"this order, but has {[match[1] for match in found]}, and {_NAME!r} {text.count(_NAME)} times: put them "
            "back around the generated part, or remove both and that part; it is then written anew below your text."
        )
    return found[0], found[1]


def _digests(comment: str) -> dict[str, set[str]]:
    pairs = (word.split("=", 1) for word in comment.split() if "=" in word)
    return {key: set(values.split(",")) for key, values in pairs}


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _items(key: str, value) -> list:
    """What of a value is kept or replaced by itself: a list's items, an index's results, or the value."""
    if key == _MODEL_INDEX:
        return [asdict(result) for result in _results(value)[1]]
    return value if isinstance(value, list) else [value]


def _results(model_index) -> tuple[str, list[EvalResult]]:
    try:
        return model_index_to_eval_results(model_index)
    except (KeyError, TypeError, ValueError, AttributeError, UnboundLocalError) as error:
        raise ValueError(f"the front matter's model-index cannot be read ({error!r}): mend it, or remove it.") from None


def _merged(theirs: dict, ours: dict, digests: dict[str, set[str]]) -> dict:
    values = {}
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        if key not in theirs:
            if key not in digests:  # else it was generated and a person has removed it
                values[key] = ours[key]
        elif key == _MODEL_INDEX:
            values[key] = _merged_index(theirs[key], ours.get(key), digests.get(key, set()))
        elif isinstance(theirs[key], list) or isinstance(ours.get(key), list):
            generated = _items(key, ours[key]) if key in ours else []
            added = [item for item in _items(key, theirs[key]) if _digest(item) not in digests.get(key, set())]
            values[key] = generated + [item for item in added if item not in generated]
        elif _digest(theirs[key]) not in digests.get(key, set()):
            values[key] = theirs[key]
        elif key in ours:
            values[key] = ours[key]
    return {key: value for key, value in values.items() if value not in (None, [])}


def _merged_index(theirs, ours, digests: set[str]) -> list:
    name, added = _results(theirs)
    added = [result for result in added if _digest(asdict(result)) not in digests]
    generated = []
    if ours is not None:
        name, generated = _results(ours)
    added = [result for result in added if not any(result.is_equal_except_value(other) for other in generated)]
    return eval_results_to_model_index(name, generated + added) if generated or added else []


def _rewritten(written: str, before: dict, values: dict) -> str:
    """The front matter's lines with those of changed keys written anew; comments and order stay."""
    lines, key, done = [], None, set()
    for line in written.splitlines(keepends=True):
        if match := _KEY.match(line):
            key = match[1]
        if line.startswith("#") or key is None or (key in values and values[key] == before.get(key)):
            lines.append(line)
        elif key in values and key not in done:
            lines.append(_dump({key: values[key]}))
        done.add(key)
    text = "".join(lines) + _dump({key: value for key, value in values.items() if key not in done})
    try:
        same = yaml.safe_load(text) == values
    except yaml.YAMLError:
        same = False
    return text if same else _dump(values)


def _dump(values: dict) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000) if values else ""
