"""Reading checkpoints of strangers: tensors come out, nothing in the file runs."""

import argparse
import collections
import functools
import os
import pathlib
import zipfile

import numpy as np
import pytest
import torch

from hf_dpssl.cli.commands import main
from hf_dpssl.convert.pickled_tensors import Settings, UnknownPickledClassError, pickled_globals, read_pickled_tensors


class Calls:
    """Pickles into a call of `function(*arguments)`, which runs where it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def save(content, path, zipped: bool = True, protocol: int = 2):
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_refused_by_name_and_does_not_run(tmp_path, zipped):
    ran = tmp_path / "ran"
    content = {
        "state_dict": {"weight": torch.ones(2)},
        "a": Calls(os.system, f"touch {ran}"),
        "b": Calls(eval, f"open({str(ran)!r}, 'w')"),
        "c": functools.partial(print, "d"),
    }
    path = save(content, tmp_path / "newer.pth", zipped, protocol=4)
    with pytest.raises(ValueError, match="newer.pth"):  # torch's restricted reader knows protocol 2 only
        read_pickled_tensors(path)
    path = save(content, tmp_path / "evil.pth", zipped)
    with pytest.raises(UnknownPickledClassError) as refused:
        read_pickled_tensors(path)
    for name in (f"{os.system.__module__}.system", "builtins.eval", "builtins.print", "functools.partial"):
        assert name in str(refused.value)
    assert not ran.exists()
    torch.load(path, weights_only=False)  # the attack is real: torch's open reader runs it
    assert ran.exists()


def test_naming_a_function_inert_does_not_run_it_either(tmp_path):
    ran = tmp_path / "ran"
    path = save({"x": torch.ones(2), "y": Calls(eval, f"open({str(ran)!r}, 'w')")}, tmp_path / "evil.pth")
    content = read_pickled_tensors(path, inert=["builtins.eval"])
    assert isinstance(content["y"], Settings) and torch.equal(content["x"], torch.ones(2))
    path = save({"y": Calls(os.system, f"touch {ran}")}, tmp_path / "evil.pth")
    with pytest.raises(UnknownPickledClassError, match="system"):  # torch blocks the module os whatever is asked for
        read_pickled_tensors(path, inert=[f"{os.system.__module__}.system"])
    assert not ran.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_settings_are_read_and_no_settings_class_is_imported(tmp_path, zipped):
    half = torch.randn(3, dtype=torch.float64).to(torch.bfloat16)
    counts = collections.defaultdict(dict, {1: {"a": 2}})
    options = argparse.Namespace(temp=8.0, method="t-SimCLR", folder=pathlib.Path("a/b"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(half.float())], lr=0.1, momentum=0.9).state_dict()
    content = {
        "state_dict": collections.OrderedDict(a=half, b=torch.nn.Parameter(torch.ones(2))),
        "opt": options, "optimizer": optimizer, "best": np.float64(3.0), "seen": {1, 2}, "counts": counts,
    }  # fmt: skip
    read = read_pickled_tensors(save(content, tmp_path / "last.pth", zipped))
    assert torch.equal(read["state_dict"]["a"], half) and read["optimizer"] == optimizer
    assert read["seen"] == {1, 2} and read["counts"] == {1: {"a": 2}}
    assert type(read["opt"]) is Settings and type(read["best"]) is Settings
    assert (read["opt"].temp, read["opt"].method) == (8.0, "t-SimCLR") and type(read["opt"].folder) is Settings


def test_unknown_class_of_another_library_can_be_left_unread(tmp_path):
    path = save({"weight": torch.ones(1), "rate": collections.UserDict(a=1)}, tmp_path / "x.ckpt")
    assert "collections.UserDict" in pickled_globals(path)
    with pytest.raises(UnknownPickledClassError, match=r"asks for collections\.UserDict, which"):
        read_pickled_tensors(path)
    assert torch.equal(read_pickled_tensors(path, inert=["collections.UserDict"])["weight"], torch.ones(1))


def test_class_of_torch_that_is_no_tensor_is_refused_by_name(tmp_path):
    path = save({"module": torch.nn.Linear(2, 2)}, tmp_path / "module.pth")
    with pytest.raises(UnknownPickledClassError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_pickled_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_is_a_value_error_wherever_it_ends(tmp_path, zipped):
    content = {"state_dict": {f"layer{i}": torch.randn(7) for i in range(3)}, "opt": argparse.Namespace(a=1)}
    path = save(content, tmp_path / "whole.pth", zipped)
    whole, cut = path.read_bytes(), tmp_path / "cut.pth"
    for end in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        cut.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            read_pickled_tensors(cut)


def test_files_that_are_no_checkpoint_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such\.ckpt is no file"):
        read_pickled_tensors(tmp_path / "no-such.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.ckpt is damaged or no checkpoint that torch\.save wrote"):
        read_pickled_tensors(tmp_path / "text.ckpt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "not a checkpoint")
    with pytest.raises(ValueError, match=r"other\.zip is damaged or no checkpoint"):
        read_pickled_tensors(tmp_path / "other.zip")


def test_a_file_that_unpacks_to_more_than_itself_is_refused_before_it_is_read(tmp_path):
    path = save({"state_dict": {"weight": torch.zeros(2_000_000)}}, tmp_path / "plain.pth")
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert bomb.stat().st_size < path.stat().st_size / 100
    assert torch.load(bomb, weights_only=True)["state_dict"]["weight"].shape == (2_000_000,)  # torch would unpack it
    with pytest.raises(ValueError, match=r"bomb.pth has [\d,]+ bytes and would unpack to 8,0"):
        read_pickled_tensors(bomb)
    assert main(["import", str(bomb), "--output_dir", str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    claims = save({"weight": torch.zeros(1).expand(10**12)}, tmp_path / "claims.pth")  # four bytes, as 10^12 numbers
    with pytest.raises(ValueError, match="its tensors claim 4,000,000,000,000"):
        read_pickled_tensors(claims)
    assert len(read_pickled_tensors(path)["state_dict"]["weight"]) == 2_000_000
