"""Models by name, string and file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from space import catalog
from space.as_vit import ASVIT_LARGE, spec, topology_space
from space.registry import SpecError


@pytest.mark.parametrize("name", catalog.names())
def test_every_named_model_has_a_spec_and_a_line(name: str):
    assert catalog.resolve(name).digest
    assert catalog.summary(name)
    assert "\n" not in catalog.summary(name)


def test_listing_imports_no_torch():
    code = "import sys; from space import catalog; print([catalog.summary(name) for name in catalog.names()], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


def test_counting_a_spec_imports_no_timm():
    code = (
        "import sys; from space.catalog import resolve; from space.cost import cost;"
        "cost(resolve('as_vit_seed')); print('timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_method_string_is_resolved():
    assert catalog.resolve(f"as_vit:{ASVIT_LARGE}") == catalog.resolve("as_vit_large") == spec(ASVIT_LARGE, img_size=224)
    with pytest.raises(SpecError, match="K1 is 9"):
        catalog.resolve("as_vit:9,2,3|4,1,2|4,1,4|4,1,6|32")


def test_a_file_holds_a_spec_or_a_candidate(tmp_path: Path):
    space = topology_space(img_size=224, proxy_img_size=64, num_classes=10)
    candidate = space.decode(next(space.points()))
    for name, data in (("spec.json", candidate.model.to_json()), ("candidate.json", candidate.to_json())):
        (tmp_path / name).write_text(json.dumps(data))
        assert catalog.resolve(str(tmp_path / name)) == candidate.model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deit_smal", "unknown model 'deit_smal'; did you mean 'deit_small'.*as_vit:STRING"),
        ("absent.json", "absent.json: .*No such file"),
        ("vit:8,2,3", "unknown model"),
    ],
)
def test_what_names_no_model_is_answered_with_the_nearest(text: str, message: str):
    with pytest.raises(SpecError, match=message):
        catalog.resolve(text)


def test_a_file_that_is_no_spec_is_named(tmp_path: Path):
    file = tmp_path / "other.json"
    for content in ("[1, 2]", '{"model": "arch"}', '{"model": {"model": "timm"}}', "\xff"):
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(SpecError, match=r"other.json: "):
            catalog.resolve(str(file))
