"""Whether a run may go on from a checkpoint: with the settings, the processes and the images that it was made with."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from .console import say

if TYPE_CHECKING:
    from ..data.image_data import ImageData
    from .recipe import RunArguments

# Where the images lie and how they are found, and where the autoencoder is: what they are is compared by content.
_FINDS_DATA = {"dataset", "dataset_revision", "image_column", "label_column"}
_FINDS_SOURCE = {"autoencoder": {"autoencoder", "autoencoder_recipe", "autoencoder_args"}}
_LENGTH = {"max_train_steps", "num_train_epochs"}
_SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")
_LISTED = 20


def record_of_data(data: ImageData | None) -> dict | None:
    """What a checkpoint remembers of the images: name, digest of the content, number, classes. None: no images."""
    if data is None:
        return None
    return {"name": data.name, "content": data.content, "classes": data.class_names, "account": data.account()}


def check_same_run(
    meta: dict, args: RunArguments, num_processes: int, data: ImageData | None, sources: dict[str, str], where: str
) -> None:
    """Compare a checkpoint's record with the run that wants to go on from it.

    Args:
        meta: of the checkpoint.
        args, num_processes, data: of the run.
        sources: fingerprints of finished models that the run builds on, by their part.
        where: the checkpoint's folder, for messages.

    Raises:
        ValueError: settings that decide about weights, the number of processes, a source or the classes are others.
    """
    then = asdict(type(args)()) | meta["arguments"]  # what came after the checkpoint had what is now its default
    now = asdict(args)
    now_data, then_data = record_of_data(data), meta.get("data")
    free = args.free_to_change() | (_FINDS_DATA if now_data and then_data else set())
    for part, fingerprint in sources.items():
        free |= _FINDS_SOURCE[part]
        recorded = meta.get("sources", {}).get(part, "not recorded")
        if recorded != fingerprint:
            raise ValueError(
                f"cannot continue the run in {where}: its {part} (fingerprint {recorded[:12]}) is not the one of now "
                f"({fingerprint[:12]}). Give that of the run, or start afresh with --overwrite."
            )
    if args.lr_scheduler in _SCHEDULES_WITHOUT_END and not args.depends_on_length():
        free |= _LENGTH
    changed = sorted(name for name in then.keys() | now.keys() if name not in free and then.get(name) != now.get(name))
    listed = [f"{name}: {then.get(name)!r} -> {now.get(name)!r}" for name in changed]
    if meta["num_processes"] != num_processes:
        listed.append(f"num_processes: {meta['num_processes']} -> {num_processes}")
    if listed:
        longer = " Another length needs a schedule without end, as of --lr_scheduler constant."
        longer = longer if _LENGTH & set(changed) else ""
        raise ValueError(
            f"cannot continue the run in {where}: its settings were others ({', '.join(listed)}). "
            f"Use the same, or start afresh with --overwrite.{longer}"
        )
    if now_data and then_data:
        _check_data(then_data, now_data, where)


def _check_data(then: dict, now: dict, where: str) -> None:
    if then["classes"] != now["classes"]:
        raise ValueError(
            f"cannot continue the run in {where}: its data {then['name']!r} had {_classes(then)}, and {now['name']!r} "
            f"has {_classes(now)}. Give the data of the run, or start afresh with --overwrite."
        )
    if then["content"] != now["content"]:
        say(
            f"the images are others than the checkpoint's in {where}: then {then['account']} ({then['name']!r}), "
            f"now {now['account']} ({now['name']!r}). Training goes on with the new ones."
        )


def _classes(record: dict) -> str:
    names = record["classes"]
    if names is None:
        return "no classes"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} classes ({', '.join(map(repr, names[:_LISTED]))}{more})"
