"""Checkpoints: whole or not there, the last two, and damage noticed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from space.model import build_model
from workers.checkpoints import latest_checkpoint, link_checkpoints, load_model, save_checkpoint, save_model


def must_not_warn(message: str) -> None:
    raise AssertionError(message)


def test_the_newest_of_several_is_loaded(tmp_path):
    for step in (1, 2, 10):
        path = save_checkpoint(tmp_path, step, {"step": step, "weights": torch.full((3,), float(step))})
    found = latest_checkpoint(tmp_path, must_not_warn)
    assert found is not None
    assert found[0] == path
    assert found[1]["step"] == 10
    assert found[1]["weights"].tolist() == [10.0] * 3


def test_the_last_two_are_kept(tmp_path):
    for step in range(5):
        save_checkpoint(tmp_path, step, {"step": step})
    assert sorted(path.name.split("-")[1] for path in tmp_path.iterdir()) == ["00000003", "00000004"]


def test_a_newer_one_than_asked_for_is_neither_loaded_nor_removed(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"step": step})
    found = latest_checkpoint(tmp_path, must_not_warn, up_to=9)
    assert found is not None
    assert found[1]["step"] == 2
    for step in (3, 4):
        save_checkpoint(tmp_path, step, {"step": step})
    assert sorted(path.name.split("-")[1] for path in tmp_path.iterdir()) == ["00000003", "00000004", "00000010"]


@pytest.mark.parametrize("has_links", [True, False])
def test_linked_checkpoints_are_the_same_and_the_source_stays(tmp_path, monkeypatch, has_links):
    def refuse(*args):
        raise OSError("no links across devices")

    for step in (1, 2):
        save_checkpoint(tmp_path / "source", step, {"step": step})
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    if not has_links:
        monkeypatch.setattr("os.link", refuse)
    for _ in range(2):
        link_checkpoints(tmp_path / "source", tmp_path / "own")
    assert {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()} == before
    assert all(path.stat().st_nlink == (2 if has_links else 1) for path in (tmp_path / "own").iterdir())
    for step in (3, 4):
        save_checkpoint(tmp_path / "own", step, {"step": step})
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


def test_linking_what_is_gone_makes_nothing(tmp_path):
    link_checkpoints(tmp_path / "source", tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


@given(position=st.integers(0, 10_000), change=st.integers(1, 255))
def test_one_damaged_byte_anywhere_sends_back_to_the_checkpoint_before(tmp_path_factory, position, change):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder, 1, {"step": 1})
    newest = save_checkpoint(folder, 2, {"step": 2, "weights": torch.arange(100.0)})
    contents = bytearray(newest.read_bytes())
    contents[position % len(contents)] ^= change
    newest.write_bytes(bytes(contents))
    warnings: list[str] = []
    found = latest_checkpoint(folder, warnings.append)
    assert found is not None
    assert found[1]["step"] == 1
    assert len(warnings) == 1
    assert newest.name in warnings[0]


def test_a_checkpoint_cut_off_is_damaged(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"weights": torch.arange(100.0)})
    path.write_bytes(path.read_bytes()[:-10])
    warnings: list[str] = []
    assert latest_checkpoint(tmp_path, warnings.append) is None
    assert "damaged" in warnings[0]


def test_what_a_killed_process_left_half_written_is_not_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})
    (tmp_path / ".writing-abc").write_bytes(b"half")
    found = latest_checkpoint(tmp_path, must_not_warn)
    assert found is not None
    assert found[1]["step"] == 1
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["step"]


def test_a_state_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(AttributeError, match="pickle"):
        save_checkpoint(tmp_path, 1, {"function": lambda: None})
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_hold_no_code(tmp_path):
    """`weights_only` refuses to load what could run something."""
    save_checkpoint(tmp_path, 1, {"path": tmp_path})
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        latest_checkpoint(tmp_path, must_not_warn)


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    (tmp_path / "usual").touch()
    path = save_checkpoint(tmp_path, 1, {})
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_stored_model_gives_the_same_logits(tmp_path, tiny_vit):
    network = build_model(tiny_vit, seed=3).eval()
    save_model(tmp_path / "model.pt", network, tiny_vit)
    loaded, model = load_model(tmp_path / "model.pt")
    assert model == tiny_vit
    images = torch.randn(2, 3, tiny_vit.img_size, tiny_vit.img_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images), network(images))
