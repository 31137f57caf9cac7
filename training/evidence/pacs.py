"""A zoo of encoders on PACS at 64 pixels: chosen, joined and selected (ZooD), and ten algorithms on one of them.

    export DPSSL_DATA=folder                            # with pacs-64px, tiny-imagenet-20c and mnist
    python training/evidence/pacs.py encoders           # the zoo, trained here
    python training/evidence/pacs.py zood               # results/pacs_zood.json
    python training/evidence/pacs.py algorithms         # results/pacs_algorithms.json: frozen features of one encoder
    python training/evidence/pacs.py fine_tuning        # results/pacs_fine_tuning.json: ERM, VREx and SWAD
    python training/evidence/pacs.py speed              # results/pacs_speed.json: ranking beside fine-tuning
    python training/evidence/pacs.py transfer           # results/pacs_transfer.json: three of the zoo on other sets

A killed stage goes on where it stopped. Encoders see tiny-imagenet-20c (photographs) or mnist at 32 pixels, PACS only
as frozen features, or fine-tuned. All settings were written down before the first run, and all are defaults but the
numbers of epochs and steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import mean

import torch
import yaml
from runs import claimed

from hf_dpssl.cli.commands import command_module
from hf_dpssl.cli.errors import reported
from hf_dpssl.data import load_images
from hf_dpssl.domains.cached_features import features_of
from hf_dpssl.domains.cells import Cell, Trainer
from hf_dpssl.domains.domain_data import load_domains
from hf_dpssl.domains.encoded_domains import PretrainedEncoder, picture_tensors
from hf_dpssl.domains.transfer import PROTOCOLS, transfer
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.results import write_results
from hf_dpssl.zoo import leave_one_domain_out

sys.path.insert(0, str(Path(__file__).parent.parent))  # the training scripts

RESULTS = Path(__file__).parent / "results"
DATASET = "pacs-64px"
PHOTOGRAPHS = "--dataset tiny-imagenet-20c --augmentation natural"
SIMCLR = "--kernel cosine --normalization anchor --feature_norm l2 --temperature 0.2"
T_SIMCLR = "--kernel student_t --normalization joint --feature_norm none --temperature 2"
QUEUE = "--negatives queue --queue_size 2048"
SMALL, WIDE = "[12, 24, 48, 96]", "[20, 40, 80, 160]"
ZOO = {  # name: channels, epochs, flags
    "simclr-2": (SMALL, 2, f"{PHOTOGRAPHS} {SIMCLR}"),
    "simclr-12": (SMALL, 12, f"{PHOTOGRAPHS} {SIMCLR}"),
    "t-simclr-2": (SMALL, 2, f"{PHOTOGRAPHS} {T_SIMCLR}"),
    "t-simclr-12": (SMALL, 12, f"{PHOTOGRAPHS} {T_SIMCLR}"),
    "moco-12": (SMALL, 12, f"{PHOTOGRAPHS} {QUEUE} {SIMCLR}"),
    "t-moco-12": (SMALL, 12, f"{PHOTOGRAPHS} {QUEUE} --kernel student_t --normalization anchor --feature_norm batch "
                             "--temperature 5 --dof 10"),
    "t-simclr-wide-6": (WIDE, 6, f"{PHOTOGRAPHS} {T_SIMCLR}"),
    "t-simclr-mnist-6": (SMALL, 6, f"--dataset mnist --augmentation digits --evaluation_images 2000 {T_SIMCLR}"),
    "untrained": (SMALL, 1, f"{PHOTOGRAPHS} {SIMCLR} --learning_rate 1e-12"),
    "untrained-wide": (WIDE, 1, f"{PHOTOGRAPHS} {SIMCLR} --learning_rate 1e-12"),
}  # fmt: skip
CHOSEN = "t-simclr-12"  # for the algorithms; written down before any run
SEEDS = "5"
STEPS = 5001  # of a fine-tuning of DomainBed
TRANSFERRED = ("simclr-12", "t-simclr-12", "untrained")
TRANSFER_SETS = {"cifar10": "cifar10-jpeg", "caltech101": "caltech101-20c", "dtd": "dtd-10c-128px"}  # parts of them
FINE_TUNING = {"steps": 200, "learning_rates": (1e-3, 1e-2), "weight_decays": (0.0, 1e-4)}  # by default 5,000 and 4 x 5
SETTINGS = {
    "algorithms": ["erm", "irm", "group_dro", "mixup", "mmd", "sagnet", "arm", "vrex", "rsc", "swad"],
    "fine_tuning": ["erm", "vrex", "swad"],
}
OPTIONS = {
    "algorithms": ["--frozen", "--steps", "301", "--evaluation_steps", "50"],
    "fine_tuning": ["--steps", "201", "--evaluation_steps", "50", "--image_size", "32"],
}


def train_encoders(folder: Path) -> None:
    """The encoders that are not there yet, and zoo.yaml."""
    import contrastive

    for name, (channels, epochs, flags) in ZOO.items():
        with claimed(folder / f"{name}.json") as free:
            if free:
                model = ["--architecture", "resnet10t", "--model_args", f'{{"channels": {channels}, "stem_width": 8}}']
                run = ["--name", name, "--output_dir", str(folder), "--image_size", "32", "--batch_size", "256"]
                more = ["--num_train_epochs", str(epochs), "--resume_from_checkpoint", "latest"]
                contrastive.main([*model, *run, *more, *flags.split()])
                write_json(folder / f"{name}.json", {"flags": flags, "channels": channels, "epochs": epochs})
    entries = [
        {"encoder": str(folder / name), "name": name, "trained": not name.startswith("untrained")} for name in ZOO
    ]
    (folder / "zoo.yaml").write_text(yaml.safe_dump({"encoders": entries}), encoding="utf-8")


def measure_zood(folder: Path) -> None:
    """Single, ensemble, selection; agreement of measures with accuracy."""
    flags = ["--zoo", str(folder / "zoo.yaml"), "--dataset", DATASET, "--domain_column", "domain"]
    if status := command_module("zood").main([*flags, "--output_dir", str(folder / "zood")]):
        raise RuntimeError(f"hf-dpssl zood ended with {status}.")
    shutil.copyfile(folder / "zood" / "zood.json", RESULTS / "pacs_zood.json")


def measure_algorithms(folder: Path, stage: str) -> None:
    """Each domain held out once by each algorithm, five seeds, the default hyper-parameters."""
    import domains

    given = ["--encoder", str(folder / CHOSEN), "--dataset", DATASET, "--domain_column", "domain", "--seeds", SEEDS]
    target = folder / stage
    domains.main([*given, "--algorithms", *SETTINGS[stage], *OPTIONS[stage], "--output_dir", str(target)])
    results = json.loads((target / "results.json").read_text(encoding="utf-8"))
    for row in results["rows"]:  # values of the seeds, of which the page makes intervals
        del row["interval"]
        chosen = row.pop("chosen")
        row["means"] = [mean(found["accuracy"] for found in of_seed.values()) for of_seed in chosen.values()]
    write_json(RESULTS / f"pacs_{stage}.json", results)


def measure_speed(folder: Path) -> None:
    """Processor seconds of ranking the trained zoo from its pictures on, and of fine-tuning it with ERM.

    A fine-tuning leaves each domain out once, with DomainBed's 5,001 steps; a step is the hundredth part of what 121
    steps take longer than 21, evaluations left out.
    """
    names = [name for name in ZOO if not name.startswith("untrained")]
    given = load_domains(DATASET, domain_column="domain")
    reading = {"batch_size": 64, "on_bad_image": "error"}
    rows = []
    for name in names:
        start = time.process_time()
        embedder = ImageEmbedder(str(folder / name))
        features, kept, _ = features_of(embedder, given, None, reading)
        embedded = time.process_time()
        leave_one_domain_out(features, given.labels[kept], given.domains[kept])
        ranked = time.process_time()
        encoder = PretrainedEncoder(embedder)
        tensors = picture_tensors(given, encoder.size)
        needed = []
        for steps in (21, 121):
            began = time.process_time()
            Trainer(tensors, "fine_tune", steps, STEPS, encoder=encoder).run(Cell("erm", (0,), 0, 0))
            needed.append(time.process_time() - began)
        row = {"encoder": name, "embedding": embedded - start, "scoring": ranked - embedded}
        row |= {"step": (needed[1] - needed[0]) / 100}
        rows.append(row | {"fine_tuning": STEPS * len(given.domain_names) * row["step"]})
    ranking = sum(row["embedding"] + row["scoring"] for row in rows)
    fine_tuning = sum(row["fine_tuning"] for row in rows)
    metrics = {"ranking_seconds": ranking, "fine_tuning_seconds": fine_tuning, "times": fine_tuning / ranking}
    about = {"dataset": DATASET, "seed": 0, "samples": len(kept), "protocol": {"steps": STEPS, "of_processor": True}}
    write_results(RESULTS / "pacs_speed.json", metrics, **about, encoders=rows)
    print(json.dumps(metrics, indent=2))


def measure_transfer(folder: Path) -> None:
    """kNN, linear classifier and fine-tuning (a small grid, few steps) of encoders on other sets."""
    rows = []
    for name in TRANSFERRED:
        given = {"sets": list(TRANSFER_SETS), "sources": TRANSFER_SETS, "protocols": PROTOCOLS}
        found = transfer(str(folder / name), **given, folder=folder / "transfer" / name, **FINE_TUNING)
        if failed := [row["error"] for row in found["rows"] if "error" in row]:
            raise RuntimeError(" ".join(failed))
        rows += [{"encoder": name} | row for row in found["rows"]]
    metrics = {f"{row['encoder']}_{row['set']}_{row['protocol']}": row["mean"] for row in rows}
    samples = {row["title"]: {part: row[part] for part in ("train", "validation", "test")} for row in rows}
    about = {"dataset": "+".join(TRANSFER_SETS.values()), "seed": 0, "samples": samples}
    write_results(RESULTS / "pacs_transfer.json", metrics, **about, protocol={"fine_tuning": FINE_TUNING}, rows=rows)


def main(argv: list[str] | None = None) -> int:
    """Run with command-line arguments `argv`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["encoders", "zood", *SETTINGS, "speed", "transfer"])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evidence-pacs"), help="encoders and runs")
    args = parser.parse_args(argv)
    load_images(DATASET)  # says which file is missing
    torch.set_num_threads(1)
    if args.stage == "encoders":
        train_encoders(args.output_dir)
    elif args.stage == "zood":
        measure_zood(args.output_dir)
    elif args.stage == "speed":
        measure_speed(args.output_dir)
    elif args.stage == "transfer":
        measure_transfer(args.output_dir)
    else:
        measure_algorithms(args.output_dir, args.stage)
    return 0


if __name__ == "__main__":
    sys.exit(reported("pacs.py", main))
