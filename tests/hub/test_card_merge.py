"""A card's generated part is replaced; what a person wrote is kept."""

import pytest
import yaml
from cases import for_each
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_dpssl.hub.card_merge import marked_card
from hf_dpssl.hub.model_card import merge_card

KNN = EvalResult("image-classification", "digits", "digits", "accuracy", 91.25, metric_name="kNN accuracy")
THEIR_OWN = EvalResult("image-classification", "org/birds", "Birds", "accuracy", 55.5)


def card(text="Figures of the run.", licence="apache-2.0", results=(KNN,), **more) -> str:
    """A generated card."""
    data = ModelCardData(license=licence, tags=["hf_dpssl", "timm"], eval_results=list(results), model_name="A model")
    return marked_card(data.to_dict() | more, text)


def edited(before: str, after: str, text: str | None = None) -> str:
    """A card in which a person has replaced one piece of text."""
    text = card() if text is None else text
    assert text.count(before) == 1
    return text.replace(before, after)


def test_the_generated_part_is_replaced_and_text_around_it_is_kept_to_the_letter():
    theirs = (
        edited("<!-- hf_dpssl:generated:begin", "My words  above.\n\n<!-- hf_dpssl:generated:begin")
        + "\n## Mine\n\n\tx\n"
    )
    merged = merge_card(theirs, card("Other figures."))
    assert "Other figures." in merged and "Figures of the run." not in merged
    assert merged.count("My words  above.\n") == 1 and merged.endswith("-->\n\n## Mine\n\n\tx\n")


def test_a_licence_that_a_person_changed_stays_and_one_he_left_alone_follows_the_data():
    restricted = card(licence="other")
    assert ModelCard(merge_card(card(), restricted)).data.license == "other"
    theirs = edited("license: apache-2.0", "license: mit")
    assert ModelCard(merge_card(theirs, restricted)).data.license == "mit"
    again = merge_card(merge_card(theirs, restricted), card())
    assert ModelCard(again).data.license == "mit", "also at the next generation"
    removed = edited("license: apache-2.0\n", "")
    assert ModelCard(merge_card(removed, restricted)).data.license is None


def test_keys_tags_and_comments_of_a_person_stay_and_generated_tags_are_renewed():
    theirs = edited(
        "license: apache-2.0\n", "license: apache-2.0  # asked our lawyer\n# mine\nlanguage: da\nthumbnail: 'a: b'\n"
    )
    theirs = edited("- timm\n", "- timm\n- birds\n", theirs)
    fresh = card().replace("- timm\n", "- transformers\n")
    merged = merge_card(theirs, fresh)
    data = ModelCard(merged).data
    assert data.tags == ["hf_dpssl", "transformers", "birds"]
    assert (data.language, data.thumbnail) == ("da", "a: b")
    assert "license: apache-2.0  # asked our lawyer\n# mine\n" in merged


def test_results_that_a_person_added_stay_and_old_generated_ones_go():
    def results(text: str) -> list[EvalResult]:
        return ModelCard(text).data.eval_results

    theirs = card(results=[KNN, THEIR_OWN]).split("<!--")[0] + "<!--" + card().split("<!--", 1)[1]
    better = EvalResult(**vars(KNN) | {"metric_value": 93.5, "metric_args": {"k": 5}})
    assert results(merge_card(theirs, card(results=[better]))) == [better, THEIR_OWN]
    forged = edited("value: 91.25", "value: 99.9")
    assert results(merge_card(forged, card())) == [KNN], "a figure of the run is the run's"


def test_a_readme_without_marks_is_kept_above_the_generated_part():
    merged = merge_card("---\nlicense: mit\ntags: birds\n---\n# Mine\n\nWords.\n", card())
    assert merged.index("# Mine\n\nWords.\n") < merged.index("Figures of the run.")
    assert ModelCard(merged).data.license == "mit"
    assert ModelCard(merged).data.tags == ["hf_dpssl", "timm", "birds"]
    assert ModelCard(merge_card("Words.", card())).data.license == "apache-2.0"
    assert merge_card(" \n", card()) == card()


@for_each(
    "damaged",
    [
        card().replace("hf_dpssl:generated:end", "hf_dpssl:generated:ende"),
        card().replace("<!-- hf_dpssl:generated:begin", "<!-- hf_dpssl:generated"),
        "\n".join(line for line in card().splitlines() if ":end" not in line),
        card() + card(),
        card().replace(":begin", ":x").replace(":end", ":begin").replace(":x", ":end"),
    ],
)
def test_damaged_marks_are_refused_with_the_way_out(damaged):
    with pytest.raises(ValueError, match="put them back around the generated part, or remove both"):
        merge_card(damaged, card())


@for_each("front_matter", ["a: [1", "- a\n- b", "model-index: 5", "model-index:\n- name: x"])
def test_front_matter_that_cannot_be_read_is_refused(front_matter):
    with pytest.raises(ValueError, match="mend it"):
        merge_card(f"---\n{front_matter}\n---\nWords.\n", card())


def test_crlf_and_byte_order_mark_of_a_card_edited_on_windows():
    theirs = "\ufeff" + (card() + "Mine.\n").replace("\n", "\r\n")
    merged = merge_card(theirs, card("Other figures."))
    assert "Other figures.\r\n" in merged and merged.endswith("Mine.\r\n")
    assert "\n" not in merged.replace("\r\n", "") and ModelCard(merged).data.license == "apache-2.0"


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\r<-"), max_size=40)
KEYS = st.sampled_from(["license", "tags", "language", "note", "datasets", "model_creator"])
VALUES = (
    PLAIN.filter(str.strip) | st.integers() | st.booleans() | st.lists(PLAIN.filter(str.strip), min_size=1, max_size=3)
)


@pytest.mark.extended
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(PLAIN, PLAIN, st.dictionaries(KEYS, VALUES), st.dictionaries(KEYS, VALUES), st.dictionaries(KEYS, VALUES))
def test_merging_twice_is_merging_once_and_loses_no_word(above, below, old, theirs, new):
    generated = marked_card(old, "Old figures.")
    front = old | theirs
    part = generated[generated.index("<!--") :]
    existing = (f"---\n{yaml.safe_dump(front)}---\n" if front else "") + f"{above}\n{part}{below}"
    fresh = marked_card(new, "New figures.")
    once = merge_card(existing, fresh)
    assert merge_card(once, fresh) == once
    head, tail = once.split("<!-- hf_dpssl:generated:begin")[0], once.split("is yours and is kept) -->\n")[1]
    assert head.endswith(f"{above}\n") and tail == below and "New figures." in once and "Old figures." not in once
    merged = yaml.safe_load(once.split("---\n")[1]) if front or new else {}
    for key, value in theirs.items():
        if key not in old and not isinstance(value, list) and not isinstance(new.get(key), list):
            assert merged[key] == value
