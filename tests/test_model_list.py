"""Lists of models as `--models` takes them: what is one name, what a pattern matches, what is left out and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from search.model_list import listed_models
from search.study import RunSettings
from space import catalog
from space.cost import cost
from space.model import resized
from space.registry import SpecError

AS_VIT = "as_vit:8,2,3|4,1,2|4,1,4|4,1,6|32"
RUN = RunSettings(study="profile", runs=Path("runs"))


def names(text: str, **sizes: int) -> list[str]:
    return [listed.name for listed in listed_models(text, RUN, **sizes).models]


def test_a_list_holds_names_strings_and_files_in_its_order(tmp_path: Path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(catalog.resolve("vit_cifar").to_json()))
    listed = listed_models(f"vit_digits, {AS_VIT},reduced:evit,keep=0.7:deit_small,deit_tiny,{file}", RUN)
    assert [one.name for one in listed.models] == ["vit_digits", AS_VIT, "reduced:evit,keep=0.7:deit_small", "deit_tiny", str(file)]
    assert [one.model for one in listed.models] == [catalog.resolve(one.name) for one in listed.models]
    assert listed.left_out == ()


def test_a_pattern_stands_for_the_names_it_matches():
    assert names("deit_*") == ["deit_tiny", "deit_small", "deit_base"]
    assert names("timm:test_vi[t]?") == ["timm:test_vit2", "timm:test_vit3", "timm:test_vit4"]


def test_one_network_under_two_names_counts_once(tmp_path: Path):
    assert names(f"vit_digits,vit_*_patch16,vit_digits,{AS_VIT},{AS_VIT}") == ["vit_digits", "vit_large_patch16", AS_VIT]


def test_sizes_are_the_models_own_unless_they_are_given():
    (own,) = listed_models("timm:test_vit", RUN).models
    assert (own.model.img_size, own.model.num_classes) == (160, 1000)
    (given,) = listed_models("timm:test_vit", RUN, img_size=32, num_classes=10).models
    assert given.model == resized(own.model, img_size=32, num_classes=10)


def test_what_cannot_run_at_the_size_is_left_out_with_its_reason():
    listed = listed_models("vit_digits,deit_tiny,timm:eva02_tin*", RUN, img_size=24)
    assert "vit_digits" in [one.name for one in listed.models]
    reasons = dict(listed.left_out)
    assert reasons["deit_tiny"] == catalog_refusal("deit_tiny", 24)
    assert all("\n" not in note and note.startswith("left out: ") for note in listed.notes)


def catalog_refusal(name: str, img_size: int) -> str:
    with pytest.raises(SpecError) as refused:
        cost(resized(catalog.resolve(name), img_size=img_size))
    return str(refused.value)


REFUSED = {
    "an unknown name": ("deit_tini", "unknown model 'deit_tini'; did you mean 'deit_tiny'"),
    "an unknown name of timm": ("timm:vit_tiny_patch16_244", "did you mean 'vit_tiny_patch16_224'"),
    "an unknown name after a string": (f"{AS_VIT},nonsense", "unknown model 'nonsense'"),
    "a wrong string": ("as_vit:9,2,3|4,1,2|4,1,4|4,1,6|32,deit_tiny", "K1 is 9"),
    "a pattern without a match in the catalogue": ("swin_*", "pattern 'swin_*' matches no name of the catalogue"),
    "a pattern without a match in timm": ("timm:vitt_*", "pattern 'timm:vitt_*' matches no name of timm.list_models()"),
    "no name": ("deit_tiny,,deit_small", "names are expected, separated by commas"),
    "nothing": ("", "names are expected, separated by commas"),
    "a digest that no entry has": ("deit_tiny,0123abcd", "no leaderboard entry has the digest '0123abcd'"),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_what_names_no_model_is_refused(text: str, words: str, tmp_path: Path):
    with pytest.raises(SpecError) as refused:
        listed_models(text, RunSettings(study="profile", runs=tmp_path))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_list_of_which_nothing_can_run_is_refused():
    with pytest.raises(SpecError, match="none of 3 can run, deit_tiny because: "):
        listed_models("deit_*", RUN, img_size=24)
