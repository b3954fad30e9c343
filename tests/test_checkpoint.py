from __future__ import annotations

import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from crd.checkpoint import Checkpoint, CheckpointFolder
from crd.errors import CRDError
from crd.loading import checkpoint_number
from crd.optimizer_state import load_optimizer_tensors, optimizer_tensors


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing past `size` bytes fails as it does on a full disk: OSError from the operating system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def checkpoint(value: float) -> Checkpoint:
    tensors = {
        "policy": {"a": torch.full((3, 5), value), "b": torch.tensor(value, dtype=torch.float64)},
        "optimizer": {"a/step": torch.tensor(value)},
    }
    return Checkpoint(tensors, {"updates_done": int(value), "seconds": value / 3})


def assert_equal(got: Checkpoint, wanted: Checkpoint) -> None:
    assert got.counters == wanted.counters
    assert got.tensors.keys() == wanted.tensors.keys()
    for stem, tensors in wanted.tensors.items():
        assert got.tensors[stem].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert got.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(got.tensors[stem][name], tensor)


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run" / "checkpoints", keep=2)


def test_others_may_read_as_far_as_the_umask_lets_them(folder: CheckpointFolder) -> None:
    before = os.umask(0o027)
    try:
        path = folder.save(3, checkpoint(3.0))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_a_folder_that_cannot_be_read(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save(3, checkpoint(3.0))

    def no_permission(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", no_permission)
    with pytest.raises(CRDError, match=r"cannot read the checkpoints.*Permission denied.*check its permissions"):
        folder.updates()


def test_comes_back_bit_for_bit_without_pickle(folder: CheckpointFolder) -> None:
    path = folder.save(3, checkpoint(3.0))
    assert_equal(folder.load(3), checkpoint(3.0))
    assert sorted(p.name for p in path.iterdir()) == ["optimizer.safetensors", "policy.safetensors", "state.json"]
    assert [p.name for p in folder.folder.iterdir()] == ["update-000003"]


def test_keeps_the_newest_and_the_best(folder: CheckpointFolder) -> None:
    assert folder.updates() == []
    assert folder.best() is None
    for update in range(1, 7):
        folder.save(update, checkpoint(float(update)))
        if update == 2:
            folder.mark_best(2, 0.5)
    assert folder.updates() == [2, 5, 6]
    assert folder.best() == (2, 0.5)
    assert [checkpoint_number(folder, wanted) for wanted in ("last", "best", "5", "update-000002")] == [6, 2, 5, 2]
    for wanted in ("4", "newest", "-1"):
        with pytest.raises(CRDError, match=r"one of \[2, 5, 6\]"):
            checkpoint_number(folder, wanted)


def test_saving_again_replaces(folder: CheckpointFolder) -> None:
    folder.save(1, checkpoint(1.0))
    folder.save(1, checkpoint(9.0))
    assert_equal(folder.load(1), checkpoint(9.0))


def _truncate(path: Path) -> None:
    file = path / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def _flip(path: Path) -> None:
    file = path / "policy.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def _forge(path: Path) -> None:
    """Nonsense in a tensor file whose digest is right."""
    (path / "policy.safetensors").write_bytes(b"nonsense")
    state = json.loads((path / "state.json").read_text())
    state["sha256"]["policy.safetensors"] = hashlib.sha256(b"nonsense").hexdigest()
    (path / "state.json").write_text(json.dumps(state))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": _truncate,
    "flipped": _flip,
    "forged": _forge,
    "lost": lambda path: (path / "policy.safetensors").unlink(),
    "state cut": lambda path: (path / "state.json").write_text('{"update":'),
    "state list": lambda path: (path / "state.json").write_text("[]"),
    "state empty": lambda path: (path / "state.json").write_text("{}"),
    "no digests": lambda path: (path / "state.json").write_text('{"sha256": 3, "counters": {}}'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_with_the_way_back(kind: str, folder: CheckpointFolder) -> None:
    folder.save(1, checkpoint(1.0))
    folder.save(2, checkpoint(2.0))
    DAMAGE[kind](folder.path(2))
    with pytest.raises(CRDError, match=rf"is corrupt.*--resume {folder.path(1)} goes back to update 1"):
        folder.load(2)
    assert_equal(folder.load(1), checkpoint(1.0))
    DAMAGE[kind](folder.path(1))
    with pytest.raises(CRDError, match=r"is corrupt.*start a new run"):
        folder.load(1)


def test_damaged_record_of_the_best(folder: CheckpointFolder) -> None:
    folder.save(1, checkpoint(1.0))
    (folder.folder / "best.json").write_text("{")
    with pytest.raises(CRDError, match=r"best\.json is corrupt.*delete it"):
        folder.best()


@pytest.mark.parametrize("limit", [0, 100, 300])
def test_a_full_disk_leaves_the_earlier_checkpoint(folder: CheckpointFolder, limit: int) -> None:
    """0: nothing can be written; 100: the tensors do not fit; 300: they do, state.json does not."""
    folder.save(1, checkpoint(1.0))
    with file_size_limit(limit), pytest.raises(CRDError, match=r"checkpoint of update 2: .*update-000001; free space"):
        folder.save(2, checkpoint(2.0))
    assert folder.updates() == [1]
    assert [path.name for path in folder.folder.iterdir()] == ["update-000001"]
    assert_equal(folder.load(1), checkpoint(1.0))
    folder.save(2, checkpoint(2.0))
    assert_equal(folder.load(2), checkpoint(2.0))


def test_a_full_disk_at_the_first_checkpoint(folder: CheckpointFolder) -> None:
    with file_size_limit(0), pytest.raises(CRDError, match="there is none before it"):
        folder.save(1, checkpoint(1.0))
    assert list(folder.folder.iterdir()) == []


def test_an_interrupted_save_is_no_checkpoint(folder: CheckpointFolder) -> None:
    folder.save(1, checkpoint(1.0))
    (folder.folder / ".saving-abc").mkdir()
    (folder.folder / "update-000002").mkdir()  # without state.json, which is written last
    (folder.folder / "update-old").mkdir()
    assert folder.updates() == [1]


def test_optimizer_state_goes_on_as_if_never_stopped() -> None:
    def steps(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, count: int) -> None:
        for number in range(count):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * (number + 1) * 3)
            optimizer.step()

    def fresh() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = [torch.nn.Parameter(torch.linspace(0, 1, 4)), torch.nn.Parameter(torch.ones(2, 2))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1)

    first, optimizer = fresh()
    steps(first, optimizer, 2)
    flat = optimizer_tensors(optimizer, ["x", "y"])
    assert set(flat) == {f"{name}/{slot}" for name in "xy" for slot in ("step", "exp_avg", "exp_avg_sq")}
    second, restored = fresh()
    for mine, theirs in zip(second, first, strict=True):
        mine.data.copy_(theirs)
    load_optimizer_tensors(restored, ["x", "y"], {name: tensor.clone() for name, tensor in flat.items()})
    steps(first, optimizer, 3)
    steps(second, restored, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(CRDError, match="other parameters, got 'x'"):
        load_optimizer_tensors(restored, ["z", "y"], flat)


def test_going_back_forgets_what_came_after(folder: CheckpointFolder) -> None:
    rewards = {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.9}
    wide = CheckpointFolder(folder.folder, keep=4)
    for update in rewards:
        wide.save(update, checkpoint(float(update)))
    wide.mark_best(4, rewards[4])
    wide.forget_after(3, rewards)
    assert (wide.updates(), wide.best()) == ([1, 2, 3], (2, 0.4))  # the best of those that are left
    wide.mark_best(1, rewards[1])  # an interruption before the mark of 2, which lies before the update to go on from
    wide.forget_after(3, rewards)
    assert wide.best() == (2, 0.4)
    wide.forget_after(2, rewards)
    assert (wide.updates(), wide.best()) == ([1, 2], (2, 0.4))  # and a mark that holds stays
    wide.forget_after(1, {})
    assert (wide.updates(), wide.best()) == ([1], None)


def test_what_was_just_saved_is_kept(folder: CheckpointFolder) -> None:
    """Even below newer numbers."""
    for update in (7, 8):
        folder.save(update, checkpoint(float(update)))
    folder.save(3, checkpoint(3.0))
    assert folder.updates() == [3, 7, 8]
    assert_equal(folder.load(3), checkpoint(3.0))


def test_replacing_never_leaves_a_moment_without_a_checkpoint(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save(1, checkpoint(1.0))
    rename = os.replace
    moments: list[bool] = []

    def watched(source: str | Path, target: str | Path) -> None:
        rename(source, target)
        whole = [path.parent for path in folder.folder.glob("*/policy.safetensors")]
        moments.append(any(path.name in ("update-000001", ".replaced-update-000001") for path in whole))

    monkeypatch.setattr("crd.checkpoint.os.replace", watched)
    folder.save(1, checkpoint(9.0))
    assert moments == [True, True]
    assert_equal(folder.load(1), checkpoint(9.0))
    assert [path.name for path in folder.folder.iterdir()] == ["update-000001"]

    def full(source: str | Path, target: str | Path) -> None:
        if Path(source).name.startswith(".saving-"):
            raise OSError("no room")
        rename(source, target)

    monkeypatch.setattr("crd.checkpoint.os.replace", full)
    with pytest.raises(CRDError, match="no room"):
        folder.save(1, checkpoint(5.0))
    assert_equal(folder.load(1), checkpoint(9.0))


def test_sweep_mends_an_interrupted_save(folder: CheckpointFolder) -> None:
    folder.save(1, checkpoint(1.0))
    folder.save(2, checkpoint(2.0))
    (folder.folder / ".saving-abc").mkdir()
    (folder.folder / ".saving-abc" / "policy.safetensors").write_bytes(b"half")
    folder.path(2).rename(folder.folder / ".replaced-update-000002")  # killed between the two renames
    (folder.folder / ".replaced-update-000001").mkdir()  # killed before the old one was removed
    folder.sweep()
    assert sorted(path.name for path in folder.folder.iterdir()) == ["update-000001", "update-000002"]
    assert_equal(folder.load(1), checkpoint(1.0))
    assert_equal(folder.load(2), checkpoint(2.0))


def test_a_full_disk_at_the_record_of_the_best(folder: CheckpointFolder) -> None:
    folder.save(1, checkpoint(1.0))
    with file_size_limit(0), pytest.raises(CRDError, match=r"cannot write .*best\.json"):
        folder.mark_best(1, 0.5)


def test_an_old_checkpoint_that_cannot_be_dropped(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for update in (1, 2):
        folder.save(update, checkpoint(float(update)))

    def denied(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(f"not yours: {path}")

    monkeypatch.setattr("crd.checkpoint.shutil.rmtree", denied)
    with pytest.raises(CRDError, match=r"cannot drop an old checkpoint: not yours.*update-000003 is saved"):
        folder.save(3, checkpoint(3.0))
    monkeypatch.undo()
    assert_equal(folder.load(3), checkpoint(3.0))
    assert folder.updates() == [2, 3]  # half deleted is no checkpoint
