"""Changes of a network as a user writes them, and `describe`, which shows and keeps them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import run_here

from search.description import count_table
from search.run import main
from space import catalog
from space.component import KINDS
from space.cost import cost, cost_by_part
from space.edits import BLOCK_KINDS, OPTIONAL_KINDS, edit_from_text, parse_parts, part_text, parts_of, places
from space.families.as_vit import ASVIT_LARGE
from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.values import Interval, parse_choices

LARGE = f"as_vit:{ASVIT_LARGE}"
NETWORKS = {name: catalog.resolve(name) for name in ("vit_digits", "deit_tiny", "as_vit_large")}


def edited(spec: ArchSpec, *texts: str) -> ArchSpec:
    for text in texts:
        _, spec = edit_from_text(spec, text, "--set")
    return spec


def blocks(spec: ArchSpec) -> list[BlockSpec]:
    return [block for stage in spec.stages for block in stage.blocks]


def test_a_component_is_exchanged_in_all_blocks_of_all_stages():
    spec = edited(NETWORKS["as_vit_large"], "feed_forward=mlp,hidden_dim=64")
    assert {block.feed_forward for block in blocks(spec)} == {Component("mlp", hidden_dim=64)}
    assert places(spec, "feed_forward") == "in all 14 blocks of 4 stages"
    before = NETWORKS["as_vit_large"]
    assert [block.mixer for block in blocks(spec)] == [block.mixer for block in blocks(before)]


def test_choices_that_are_not_said_stay_where_the_new_component_has_them(tiny_vit: ArchSpec):
    wide = edited(tiny_vit, "mixer=attention,qkv_bias=false", "pooling=gem,p=2", "pooling=ggem,groups=4")
    assert blocks(wide)[0].mixer == Component("attention", num_heads=2, head_dim=8, qkv_bias=False)
    assert wide.pooling == Component("ggem", groups=4, p=2.0)
    assert edited(wide, "pooling=mean").pooling == Component("mean")


def test_one_choice_a_missing_part_and_the_fields(tiny_vit: ArchSpec):
    spec = edited(tiny_vit, "feed_forward.hidden_dim=7", "pooling=mean", "prefix=none", "depth=3", "embed_dim=24", "num_classes=4")
    (stage,) = spec.stages
    assert (stage.embed_dim, len(stage.blocks), spec.num_classes, spec.prefix) == (24, 3, 4, None)
    assert set(stage.blocks) == {BlockSpec(mixer=blocks(tiny_vit)[0].mixer, feed_forward=Component("mlp", hidden_dim=7))}
    assert cost(spec).params


@pytest.mark.parametrize("name", NETWORKS)
def test_every_part_is_written_as_it_is_read(name: str):
    spec = NETWORKS[name]
    for kind in KINDS:
        for part in parts_of(spec, kind):
            assert parse_parts(kind, part_text(part), "here") == [part]
        if kind not in BLOCK_KINDS and kind != "downsampling":
            assert edited(spec, f"{kind}={part_text(getattr(spec, kind))}") == spec


def test_a_list_of_components_has_choices_behind_their_names():
    parts = parse_parts("pooling", "mean, gem,p=2,learned=false,gem", "here")
    assert parts == [Component("mean"), Component("gem", p=2.0, learned=False), Component("gem")]


MISTAKES = {
    "poling=gem": "unknown part or field of a network 'poling' in --set; did you mean 'pooling'",
    "pooling=gm": "unknown pooling 'gm' in --set pooling; did you mean 'gem' or 'ggem'? known: class_token, gem",
    "pooling=gem,q=2": "unknown choice 'q' in --set pooling: pooling 'gem'; known: learned, p",
    "pooling=gem,p=many": "--set pooling: pooling 'gem': p is 'many'; a number is expected",
    "pooling=gem,p=-1": "p is -1.0; allowed: float, above 0",
    "pooling=gem,mean": "--set pooling is 'gem,mean'; one component is expected",
    "pooling=p=2,gem": "a component's name is expected before 'p=2'",
    "pooling=ggem": "pooling 'ggem' needs a value for 'groups' (int, above 0), e.g. ggem,groups=1",
    "pooling.p=2": "unknown choice 'p' in --set pooling.p: pooling 'class_token'",
    "pooling.=2": "KIND.CHOICE is expected",
    "pooling": "TARGET=VALUE is expected",
    "head=none": f"--set head: there is always a head; only {', '.join(OPTIONAL_KINDS)} may be none",
    "depth=0": "--set depth is 0; a whole number above 0 is needed",
    "depth=some": "--set depth is 'some'; a whole number is expected",
    "downsampling=patch_merging,kernel=2": "--set downsampling: the network has one stage, and no downsampling",
    "token_reduction.rate=2": "--set token_reduction.rate: the network has no token_reduction",
    "prefix=none": "pooling 'class_token' needs a class token",
}


@pytest.mark.parametrize(("text", "words"), MISTAKES.items(), ids=MISTAKES)
def test_a_wrong_change_is_one_line_that_says_what_is_allowed(tmp_path: Path, text: str, words: str):
    done = run_here(main, "describe", "deit_tiny", "--set", text, "--out", "x.json", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not (tmp_path / "x.json").exists()


def test_networks_that_cannot_be_changed_are_refused(tmp_path: Path, tiny_vit: ArchSpec):
    with pytest.raises(SpecError, match="--set depth: the network has 4 stages of their own depth"):
        edited(NETWORKS["as_vit_large"], "depth=3")
    (stage,) = tiny_vit.stages
    other = dataclasses.replace(stage.blocks[0], feed_forward=Component("mlp", hidden_dim=3))
    mixed = dataclasses.replace(tiny_vit, stages=(StageSpec(embed_dim=16, blocks=(stage.blocks[0], other)),))
    with pytest.raises(SpecError, match="the blocks of the network differ"):
        edited(mixed, "depth=3")
    done = run_here(main, "describe", "convnext_cifar", "--set", "pooling=mean", cwd=tmp_path)
    assert "--set pooling=mean takes networks of our components" in done.stderr


@pytest.mark.parametrize("model", ["deit_small", LARGE, "timm:vit_tiny_patch16_224", "vit_digits"])
def test_a_description_fits_80_columns_and_ends_with_totals_and_digest(tmp_path: Path, model: str):
    done = run_here(main, "describe", model, "--set" if model == "deit_small" else "--runs", "pooling=gem", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-2].startswith("total ")
    assert lines[-1].startswith("digest ")


def test_equal_blocks_stand_there_once_and_rows_add_up_to_the_total():
    spec = NETWORKS["deit_tiny"]
    table = count_table(cost_by_part(spec), cost(spec))
    assert sum("12 x block, each" in line for line in table) == 1
    assert sum("feed_forward" in line for line in table) == 1
    counts = [[int(count.replace(",", "")) for count in line.split()[-3:]] for line in table[1:-1] if not line.startswith(" ")]
    assert tuple(map(sum, zip(*counts, strict=True))) == tuple(cost(spec))


def test_blocks_that_differ_stand_apart(tiny_vit: ArchSpec):
    (stage,) = tiny_vit.stages
    other = dataclasses.replace(stage.blocks[0], feed_forward=Component("mlp", hidden_dim=3))
    spec = dataclasses.replace(tiny_vit, stages=(StageSpec(embed_dim=16, blocks=(*stage.blocks, other, stage.blocks[0])),))
    rows = [line.split()[0] for line in count_table(cost_by_part(spec), cost(spec)) if line.startswith("stages")]
    assert rows == ["stages.0.blocks.0-1", "stages.0.blocks.2", "stages.0.blocks.3"]


def test_a_methods_string_is_said_in_words(tmp_path: Path):
    shown = run_here(main, "describe", LARGE, cwd=tmp_path).stdout
    assert "K,S,E,L of each stage, then H,C" in shown
    rows = [line.split() for line in shown.splitlines() if line[:1] in "1234" and "stride" in line]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert " ".join(rows[0]) == "1 8 x 8 pixels, stride 4 2 x 2 3 x width 5 180 4"
    assert "H = 32 heads in the last stage" in shown
    assert catalog.explanation("deit_tiny") == catalog.explanation("timm:resnet18") == ()


def test_what_describe_writes_is_a_model_for_every_command(tmp_path: Path):
    flags = ["--set", "pooling=gem", "--set", "feed_forward=mlp,hidden_dim=16", "--out", "mine.json", "--json"]
    first = run_here(main, "describe", "vit_digits", *flags, cwd=tmp_path)
    printed = json.loads(first.stdout)
    assert printed["spec"]["pooling"] == ["gem"]
    assert json.loads((tmp_path / "mine.json").read_text()) == printed
    assert json.loads(run_here(main, "describe", "mine.json", "--json", cwd=tmp_path).stdout) == printed
    measured = run_here(main, "evaluate", "mine.json", "--evaluators", "cost", "--json", cwd=tmp_path)
    assert json.loads(measured.stdout)["digest"] == printed["digest"]
    refused = run_here(main, "describe", "vit_digits", "--out", "mine.json/x.json", cwd=tmp_path)
    assert (refused.returncode, "--out mine.json/x.json" in refused.stderr) == (2, True)


def test_evaluate_says_what_it_measured_under(tmp_path: Path):
    flags = ["--evaluators", "profile", "--set", "profile.num_runs=30", "--set", "profile.batch_size=2", "--img-size", "16"]
    shown = run_here(main, "evaluate", "vit_digits", *flags, cwd=tmp_path).stdout
    assert ", 1 thread, seed 0, " in shown
    assert "profile: precision fp32, batch_size 2, num_runs 30, num_warmup 10" in shown
    assert "forward pass of a batch, lower quartile" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_settings_of_an_evaluator_are_found_by_its_old_name_too(tmp_path: Path):
    flags = ["--evaluators", "short_train", "--set", "short_train.temperature=-1", "--recipe", "epochs=1"]
    done = run_here(main, "evaluate", "vit_digits", *flags, cwd=tmp_path)
    assert "temperature is -1.0" in done.stderr


@pytest.mark.parametrize(
    ("text", "hint", "choices"),
    [
        ("1, 2,4", int, (1, 2, 4)),
        ("2..5", int, range(2, 6)),
        ("1e-4..1e-2:log", float, Interval(1e-4, 1e-2, log=True)),
        ("0..1", float, Interval(0.0, 1.0)),
        ("true,false", bool, (True, False)),
        ("adamw,lion", str, ("adamw", "lion")),
    ],
)
def test_choices_are_lists_ranges_and_intervals(text: str, hint: type, choices: object):
    assert parse_choices(text, hint, "here") == choices


@pytest.mark.parametrize(
    ("text", "hint", "words"),
    [
        ("1,2,1", int, "here has 1 twice"),
        ("5..2", int, "a range goes from a number up to a larger one"),
        ("2..5:log", int, r"allowed: A\.\.B or a list A,B,C"),
        ("1..2:exp", float, r"A\.\.B:log"),
        ("0..1:log", float, "a logarithm needs numbers above 0"),
        ("1..inf", float, "an interval goes from a number up to a larger one"),
        ("a..b", str, "allowed: a list A,B,C"),
        ("1..", float, "here is ''; a number is expected"),
    ],
)
def test_choices_that_make_no_axis_are_refused(text: str, hint: type, words: str):
    with pytest.raises(SpecError, match=words):
        parse_choices(text, hint, "here")
