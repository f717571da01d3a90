"""The contract of every family of named networks, and a family that is one file."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPOSITORY

from space import catalog
from space.cost import cost
from space.family import families
from space.model import kinds, model_from_json


class RandomTrial:
    """Answers a space's questions uniformly at random."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def suggest_categorical(self, name: str, choices):
        return self._random.choice(choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        return self._random.randrange(low, high + 1, step)


def test_no_name_has_two_meanings():
    models = Counter(name for family in families.names() for name in families.get(family).models)
    spaces = Counter(name for family in families.names() for name in families.get(family).spaces)
    assert {name for counts in (models, spaces) for name, count in counts.items() if count > 1} == set()
    assert set(families.names()) & set(kinds.names()) == set()


@pytest.mark.parametrize("name", families.names())
def test_a_family_has_a_line_and_something_to_offer(name: str):
    assert families.summary(name)
    family = families.get(name)
    assert family.models or family.read or family.spaces


@pytest.mark.parametrize("name", catalog.spaces())
def test_a_space_has_the_name_and_makes_the_networks_it_is_asked_for(name: str):
    space = catalog.spaces()[name](img_size=64, num_classes=7)
    assert space.name == name
    for seed in range(5):
        params = space.suggest(RandomTrial(seed))
        space.check(params)
        candidate = space.decode(params)
        assert (candidate.model.img_size, candidate.model.num_classes) == (64, 7)
        assert model_from_json(json.loads(json.dumps(candidate.to_json()))["model"]) == candidate.model
        assert cost(candidate.model).params > 0


FAMILY = '''
from space.families.vit import plain_vit
from space.family import Family, NamedModel, family
from space.search_space import Axis, Candidate, SearchSpace


def widths(*, img_size, num_classes):
    def decode(params):
        return Candidate(model=plain_vit(params["width"], 1, 1, img_size=img_size, num_classes=num_classes))

    return SearchSpace(name="narrow/widths", axes=(Axis(name="width", choices=(8, 16)),), decode=decode)


@family("narrow")
def narrow() -> Family:
    """Narrow: one block, one head."""
    return Family(
        models={"narrow_8": NamedModel(summary="one block 8 wide", make=lambda: plain_vit(8, 1, 1))},
        read=lambda text: plain_vit(int(text), 1, 1),
        spaces={"narrow/widths": widths},
    )
'''

USE_OF_A_FAMILY = """
from space import catalog
from space.registry import SpecError

assert catalog.resolve("narrow:8") == catalog.resolve("narrow_8")
assert catalog.spaces()["narrow/widths"](img_size=32, num_classes=2).size == 2
try:
    catalog.resolve("narow_8")
except SpecError as error:
    print(catalog.summary("narrow_8"), "|", error)
"""


def test_a_family_is_one_file(tmp_path: Path):
    shutil.copytree(REPOSITORY / "space", tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "space" / "families" / "narrow.py").write_text(FAMILY)
    command = [sys.executable, "-c", USE_OF_A_FAMILY]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("one block 8 wide | unknown model 'narow_8'; did you mean 'narrow_8'")
    assert "narrow:STRING" in done.stdout
