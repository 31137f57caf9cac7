"""Which licence a card states, and whether those of the training images allow any use.

Both fail closed: a text that is not known word for word is none of the free licences. The licence of a model is never
guessed from that of its images.
"""

from __future__ import annotations

import re

# Identifiers that the Hub knows, SPDX's in lower case: https://huggingface.co/docs/hub/repositories-licenses
_OF_THE_HUB = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0",
    "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "gpl-2.0", "gpl-3.0", "isc", "lgpl-2.1",
    "lgpl-3.0", "mit", "mpl-2.0", "ms-pl", "ncsa", "ofl-1.1", "osl-3.0", "postgresql", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
KEYS = ("license", "license_name", "license_link")
# Of images: any use, with no more than credit, or share-alike of the images themselves.
_FREE = re.compile(
    r"cc0(-1\.0)?|cc-by(-sa)?-[1-4]\.0|mit|apache-2\.0|bsd-[23]-clause|unlicense|pddl(-1\.0)?|odc-by(-1\.0)?|"
    r"cdla-permissive-[12]\.0|public-domain|free-with-credit-to-at&t-cambridge"
)


def licence_entries(licence: str | None, link: str | None, licences_of_data: dict[str, str]) -> dict[str, str]:
    """Front matter of a card: {"license", "license_name", "license_link"}, or less; see the top of this file.

    Args:
        licence: of the model, as its maker says. An identifier of the Hub stands as it is, all else is "other" with
            this as its name. None: nothing is stated, or "other" where the images' licence restricts it.
        link: address or file of a licence that is no identifier.
        licences_of_data: by data set, see `card_data.licences_of`.

    Raises:
        ValueError: a link without a licence of its own name, or an empty licence.
    """
    if licence is None:
        if link:
            raise ValueError("--license_link is the text of a licence: name that with --license.")
        known = [text for text in licences_of_data.values() if is_restricted(text) and text != "unknown"]
        return {"license": "other", "license_name": _slug("; ".join(known))} if known else {}
    if not _slug(licence):
        raise ValueError(f"--license must name a licence, such as apache-2.0, got {licence!r}.")
    if identifier(licence) in _OF_THE_HUB:
        if link:
            raise ValueError(f"{licence} needs no --license_link: the Hub knows it.")
        return {"license": identifier(licence)}
    return {"license": "other", "license_name": _slug(licence)} | ({"license_link": link} if link else {})


def identifier(licence: str) -> str:
    """In the form of an SPDX identifier in lower case: "CC BY 4.0 (of its makers)" is cc-by-4.0."""
    return re.sub(r"[\s_]+", "-", re.sub(r"\([^()]*\)", "", licence).strip().lower())


def is_restricted(licence: str) -> bool:
    """Whether a licence of images is not known to allow any use; of a union ("a; b") whether one of them is not."""
    return not all(_FREE.fullmatch(identifier(part)) for part in licence.split(";"))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60].strip("-.")
