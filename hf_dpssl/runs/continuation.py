"""Whether a run may go on from a checkpoint: with the settings, the processes and the images that it was made with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .console import say

if TYPE_CHECKING:
    from ..data.image_data import ImageData
    from .recipe import RunArguments

# Where the images lie and how they are found, and where the autoencoder is: what they are is compared by content.
_FINDS_DATA = {"dataset", "dataset_revision", "image_column", "label_column"}
_FINDS_SOURCE = {"autoencoder": {"autoencoder", "autoencoder_recipe", "autoencoder_args"}}
# What of that is the run's: earlier checkpoints do not name the second, which is compared where it is recorded.
_GIVE = {
    "autoencoder": "that of the run",
    "latent normalization": "the run's own --autoencoder (this one has other latent_mean and latent_std)",
}
_LENGTH = {"max_train_steps", "num_train_epochs"}
_SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")
_LISTED = 20


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        count: how many.
        sharded: the model's parameters are spread over them.
        bound: why their number decides about the weights though the batch of all of them stays; None: it does not.
    """

    count: int
    sharded: bool
    bound: str | None = None


def record_of_data(data: ImageData | None) -> dict | None:
    """What a checkpoint remembers of the images: name, digest of the content, number, classes. None: no images."""
    if data is None:
        return None
    return {"name": data.name, "content": data.content, "classes": data.class_names, "account": data.account()}


def check_same_run(
    meta: dict,
    args: RunArguments,
    processes: Processes,
    data: ImageData | None,
    sources: dict[str, str],
    where: str,
) -> None:
    """Compare a checkpoint's record with the run that wants to go on from it.

    The number of processes may change where the batch of all of them does not: what is random is a function of the
    sample, so only the order of sums differs (and what dropout and revived codes draw).

    Args:
        meta: of the checkpoint.
        args, processes, data: of the run.
        sources: fingerprints of finished models that the run builds on, by their part.
        where: the checkpoint's folder, for messages.

    Raises:
        ValueError: settings that decide about weights, the batch of all processes, a source or the classes are others;
            the number of processes is, and the run depends on it.
    """
    then = asdict(type(args)()) | meta["arguments"]  # what came after the checkpoint had what is now its default
    now = asdict(args)
    now_data, then_data = record_of_data(data), meta.get("data")
    free = args.free_to_change() | (_FINDS_DATA if now_data and then_data else set())
    for part, fingerprint in sources.items():
        free |= _FINDS_SOURCE.get(part, set())
        unrecorded = "not recorded" if part in _FINDS_SOURCE else fingerprint
        recorded = meta.get("sources", {}).get(part, unrecorded)
        if recorded != fingerprint:
            raise ValueError(
                f"cannot continue the run in {where}: its {part} (fingerprint {recorded[:12]}) is not the one of now "
                f"({fingerprint[:12]}). Give {_GIVE[part]}, or start afresh with --overwrite."
            )
    if args.lr_scheduler in _SCHEDULES_WITHOUT_END and not args.depends_on_length():
        free |= _LENGTH
    readers_then, readers_now = (
        (count, max(1, arguments["num_workers"]))
        for count, arguments in ((meta["num_processes"], then), (processes.count, now))
    )
    if meta.get("readers") and readers_then != readers_now:
        raise ValueError(
            f"cannot continue the run in {where}: its stream was read by {readers_then[0]} processes x "
            f"{readers_then[1]} workers, each with its own shards, and now there are {readers_now[0]} x "
            f"{readers_now[1]}. Use the same; with --stream_reading whole from the start, any number could go on."
        )
    free |= _check_processes(meta, processes, then["batch_size"], now["batch_size"], where)
    changed = sorted(name for name in then.keys() | now.keys() if name not in free and then.get(name) != now.get(name))
    listed = [f"{name}: {then.get(name)!r} -> {now.get(name)!r}" for name in changed]
    if listed:
        longer = " Another length needs a schedule without end, as of --lr_scheduler constant."
        longer = longer if _LENGTH & set(changed) else ""
        raise ValueError(
            f"cannot continue the run in {where}: its settings were others ({', '.join(listed)}). "
            f"Use the same, or start afresh with --overwrite.{longer}"
        )
    if now_data and then_data:
        _check_data(then_data, now_data, where)


def _check_processes(meta: dict, now: Processes, batch_then: int, batch_now: int, where: str) -> set[str]:
    """The arguments that may differ since the number of processes does."""
    then = Processes(meta["num_processes"], meta.get("sharded", False))
    if then.sharded != now.sharded:
        kinds = {True: "sharded (FSDP)", False: "not sharded"}
        raise ValueError(
            f"cannot continue the run in {where}: it was {kinds[then.sharded]}, and is {kinds[now.sharded]} now. "
            "Use the same configuration of accelerate, or start afresh with --overwrite."
        )
    if then.count == now.count:
        return set()
    change = f"with {now.count} processes, where it had {then.count}"
    whole_batch = then.count * batch_then
    if now.bound:
        raise ValueError(f"cannot continue the run in {where} {change}: {now.bound}. Start {then.count}.")
    if whole_batch != now.count * batch_now:
        fitting = f" or give --batch_size {whole_batch // now.count}" if whole_batch % now.count == 0 else ""
        raise ValueError(
            f"cannot continue the run in {where} {change}: the batch of all processes was {whole_batch} "
            f"({then.count} x {batch_then}) and now is {now.count * batch_now} ({now.count} x {batch_now}). "
            f"Start {then.count}{fitting}."
        )
    say(
        f"the run in {where} goes on {change}, and with the same batch of {whole_batch}: sums are taken in another "
        "order, and dropout and revived codes, where there are any, draw other numbers."
    )
    return {"batch_size"}


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
