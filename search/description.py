"""A model in words and exact counts, for a terminal of 80 columns."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from results.formats import shortened
from space.component import Cost
from space.cost import cost, cost_by_part
from space.edits import part_text
from space.families.sn_net import Anchors, compute_levels, level_gap
from space.model import Model, as_arch, depth_of
from space.spec import ArchSpec, BlockSpec
from space.values import value_text
from workers.evaluator import Call

WIDTH = 80
NAME_WIDTH = 28
COUNT_WIDTHS = (15, 18, 19)
BLOCK = re.compile(r"(?P<row>.*\bblocks)\.(?P<number>\d+)\.(?P<part>.+)")


def description(model: Model) -> list[str]:
    """The lines of `describe`: what the model is made of, its counts for one image, its digest."""
    arch = as_arch(model)
    return [
        *(made_of(arch) if arch else ()),
        *count_table(cost_by_part(model), cost(model)),
        f"digest {model.digest}   {model.img_size} px, depth {depth_of(model)}, {model.num_classes} classes",
    ]


def stitch_rows(anchors: Anchors, space: str) -> list[dict[str, Any]]:
    """Every usable stitch of a stitching space: its number, key and kind, and the exact counts of its network."""
    rows = []
    for stitch in anchors.stitches(space):
        counted = cost(anchors.stitch(stitch.route))
        rows.append({"id": stitch.id, "key": anchors.key(stitch.route), "kind": stitch.kind, **counted._asdict()})
    return rows


def stitch_table(anchors: Anchors, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The stitches in lines, the cheapest first, and how they spread over levels of cost."""
    levels = compute_levels([row["fvcore_macs"] for row in rows], level_gap(anchors.models))
    lines = [f"{len(rows)} stitches of {' and '.join(anchors.names)}, on {len(levels)} levels of cost", ""]
    lines.append(f"{'id':>4}  {'kind':8}{'gmacs':>9}{'params_m':>10}  MODEL: sn_net:{'+'.join(anchors.names)}:...")
    for number, level in enumerate(levels):
        lines += [""] if number else []
        for row in sorted((rows[position] for position in level), key=lambda row: row["macs"]):
            route = row["key"].rpartition(":")[2]
            lines.append(f"{row['id']:>4}  {row['kind']:8}{row['macs'] / 1e9:>9.3f}{row['params'] / 1e6:>10.2f}  {route}")
    return lines


def call_in_words(call: Call, values: Mapping[str, float]) -> list[str]:
    """What an evaluator measured, a line for each metric, below the settings it measured under."""
    settings = [f"{name} {value_text(value)}" for name, value in call.to_json()["settings"].items()]
    lines = textwrap.wrap(": ".join([call.name, *filter(None, [", ".join(settings)])]), WIDTH, subsequent_indent="  ")
    for metric in call.evaluator.metrics:
        line = f"  {metric.name:26}{values[metric.name]:<12.6g}{metric.summary}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=" " * 40, break_on_hyphens=False)
    return lines


def made_of(spec: ArchSpec) -> list[str]:
    """The components of the network as `--set` takes them, without choices at their default."""
    lines = ["made of (KIND and what --set KIND=... takes):"]
    lines += [_line(kind, part_text(getattr(spec, kind))) for kind in ("patch_embed", "prefix", "position")]
    for number, stage in enumerate(spec.stages):
        lines.append(f"  stage {number}: embed_dim {stage.embed_dim}")
        first = 0
        for block, equal in itertools.groupby(stage.blocks):
            length = len(list(equal))
            lines.append(f"    {length} x block ({_range(first, length)})")
            lines += [_line(kind, part_text(getattr(block, kind)), 4) for kind in _kinds_of(block)]
            first += length
        if stage.downsampling is not None:
            lines.append(_line("downsampling", part_text(stage.downsampling)))
    lines += [_line(kind, part_text(getattr(spec, kind))) for kind in ("norm", "pooling", "head")]
    return [*lines, f"  img_size {spec.img_size}, in_chans {spec.in_chans}, num_classes {spec.num_classes}", ""]


def count_table(parts: Mapping[str, Cost], total: Cost) -> list[str]:
    """Counts of every part, the total last; neighbouring blocks with equal counts stand there once."""
    titles = zip(("params", "macs", "fvcore_macs"), COUNT_WIDTHS, strict=True)
    lines = [f"{'part':{NAME_WIDTH}}" + "".join(f"{title:>{width}}" for title, width in titles)]
    for first, number, block in _folded(parts):
        if isinstance(block, Cost):
            lines.append(_row(first, block))
            continue
        each = sum(block.values(), Cost())
        row, _, index = first.rpartition(".")
        if number > 1:
            together = Cost(*(number * count for count in each))
            lines += [_row(f"{row}.{_range(int(index), number)}", together), _row(f"  {number} x block, each", each)]
        else:
            lines.append(_row(first, each))
        lines += [_row(f"    {name}", counted) for name, counted in block.items()]
    return [*lines, _row("total", total)]


def _folded(parts: Mapping[str, Cost]) -> Iterator[tuple[str, int, Cost | dict[str, Cost]]]:
    """The path of a part and its counts, or of the first of so many equal blocks and the counts of the parts of each."""
    blocks: dict[str, dict[str, Cost]] = {}
    rows: dict[str, Cost | dict[str, Cost]] = {}
    for path, counted in parts.items():
        if found := BLOCK.fullmatch(path):
            block = f"{found['row']}.{found['number']}"
            rows[block] = blocks.setdefault(block, {})
            blocks[block][found["part"]] = counted
        else:
            rows[path] = counted
    for (_, counted), equal in itertools.groupby(rows.items(), key=lambda row: (_place(row[0], blocks), row[1])):
        paths = [path for path, _ in equal]
        yield paths[0], len(paths), counted


def _place(path: str, blocks: Mapping[str, object]) -> str:
    """What rows must share to be folded: the stage of a block, the whole path of another part."""
    return path.rpartition(".")[0] if path in blocks else path


def _range(first: int, length: int) -> str:
    return f"{first}" if length == 1 else f"{first}-{first + length - 1}"


def _kinds_of(block: BlockSpec) -> tuple[str, ...]:
    return ("mixer", "token_reduction", "feed_forward") if block.token_reduction else ("mixer", "feed_forward")


def _line(kind: str, text: str, indent: int = 0) -> str:
    return f"{'':{indent}}  {kind:{18 - indent // 2}}{text}"


def _row(name: str, counted: Cost) -> str:
    counts = zip(counted, COUNT_WIDTHS, strict=True)
    return f"{shortened(name, NAME_WIDTH - 1):{NAME_WIDTH}}" + "".join(f"{count:>{width},}" for count, width in counts)
