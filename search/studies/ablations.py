"""Which pooling, which mixing augmentation and which optimizer pay off: one factor changed at a time, seeds paired.

    search/run.py ablations --factor pooling --factor mixing --factor optimizer --data digits --seeds 3

Every factor starts from the same reference: class-token pooling, no mixing, AdamW. A level changes exactly one thing; all
poolings keep the class token in the sequence. Seeds are paired: a seed is the same initial weights, the same order of the
images and the same augmentation in every level. A cell is a point of the design, a level of a factor under a seed, and is one
trial; cells that are equal, such as the reference in all factors, are measured once and told again.

What is tested is fixed before the first trial (`Design`, in Optuna's study and the parent run): one primary contrast for each
factor, every other level against the reference, Holm-corrected. Selection would look at the validation part; effects are
those on test images. The study may be extended by factors, levels and seeds under the same name; the report then says how often effects
were shown before more trials came.

`--linear-probe` adds two phases: `backbone` trains the reference once, `probe` trains nothing but pooling and head on its
frozen tokens, under many seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from results.records import Metric
from search.default_recipe import default_recipe
from search.fixed_points import grid
from search.study import CONVERGING, DEFAULT_DATA, FineTuning, Need, Phase, RunSettings, SettingsError, Study, study
from space.model import Model, as_arch, require_arch, resized, supports_class_row, token_size
from space.registry import SpecError, unknown_name
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec, Component, full_choices
from workers.mixings import mixing_class, mixings

if TYPE_CHECKING:
    from results.effects.design import Contrast, Design
    from workers.evaluator import Call

FIRST_MIXINGS = ("mixup", "cutmix", "mixup_cutmix", "patch_mixing", "mask_mix", "transmix", "mixpro")
"""Stored studies have them in this order; all other registered mixings follow by name."""
NO_LEVELS = frozenset({"patch_tokens"})
"""Mixings that change more than one thing: this one brings a second classifier."""


def _place(mixing: str) -> int:
    return FIRST_MIXINGS.index(mixing) if mixing in FIRST_MIXINGS else len(FIRST_MIXINGS)


LEVELS: dict[str, tuple[str, ...]] = {
    "pooling": ("class_token", "mean", "relu_mean", "max", "gem", "ggem_frozen", "ggem"),
    "mixing": ("none", *sorted(set(mixings.names()) - NO_LEVELS, key=lambda name: (_place(name), name))),
    "optimizer": ("adamw", "lion", "lamb", "sgd"),
}
"""The levels of each factor, the reference's first. They are the choices of the study's axes: a new level makes another space,
in which an older study is refused and needs another --name or --fresh."""

MAX_SEED = 10_000

LR_SCALES = {
    "adamw": 1.0,
    # `Recipe` itself turns AdamW's rates into Lion's.
    "lion": 1.0,
    # DeiT trains with AdamW at 1e-3 (https://arxiv.org/abs/2012.12877), DeiT III with LAMB at 3e-3 (https://arxiv.org/abs/2204.07118).
    "lamb": 3.0,
    # ViT is trained with Adam at 1e-3 and tuned by SGD with momentum at 3e-2 (https://arxiv.org/abs/2010.11929, tables 3 and 4).
    "sgd": 30.0,
}
"""The learning rate of each optimizer relative to AdamW's; weight decay is divided by it, so that their product stays."""

ROBUSTNESS = ("patch_mix_fine_auc", "patch_mix_coarse_auc", "patch_drop_auc", "permutation_auc")


@dataclass(frozen=True, kw_only=True)
class AblationOptions(FineTuning):
    """What is compared, and how long each cell is trained."""

    factor: tuple[str, ...] = field(default=(), metadata={"help": f"what is varied, of {', '.join(LEVELS)}; repeatable; default: all"})
    level: tuple[str, ...] = field(default=(), metadata={"help": "FACTOR=LEVEL: only these levels beside the reference; repeatable"})
    seeds: int = field(
        default=3, metadata={"help": "paired trainings of each level, counting from --seed; 0: the linear probe alone", "at_least": 0}
    )
    epochs: int = field(default=0, metadata={"help": "epochs of each training; 0: 60 for digits, else 20", "at_least": 0})
    model: str = field(default="", metadata={"help": "as for describe; default: vit_digits for digits, else vit_cifar"})
    batch_size: int = field(default=0, metadata={"help": "images per step; 0: 32 for digits, else 128", "at_least": 0})
    lr: float = field(
        default=0.0,
        metadata={"help": "AdamW's learning rate, from which the others' follow; 0: 3e-3 for digits, else 1e-3", "at_least": 0},
    )
    robustness: bool = field(default=False, metadata={"help": "also measure robustness curves of every network"})
    linear_probe: bool = field(default=False, metadata={"help": "also compare the poolings on a frozen backbone"})
    probe_seeds: int = field(default=20, metadata={"help": "trainings of each pooling on the frozen backbone", "at_least": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        for factor in self.factor:
            if factor not in LEVELS:
                raise unknown_name("factor", factor, LEVELS, "--factor")
        for text in self.level:
            factor, equals, level = text.partition("=")
            if not equals or factor not in LEVELS:
                raise SpecError(f"--level {text!r}; FACTOR=LEVEL is expected, of factors {', '.join(LEVELS)}")
            if level not in LEVELS[factor]:
                raise unknown_name(f"level of {factor}", level, LEVELS[factor], "--level")
            if level == LEVELS[factor][0]:
                raise SpecError(f"--level {text!r}: the reference is always there; name others: {', '.join(LEVELS[factor][1:])}")
            if factor not in self.factors:
                raise SpecError(f"--level {text!r}, but --factor names only {', '.join(self.factors)}")
        if self.probe_seeds != AblationOptions.probe_seeds and not self.linear_probe:
            raise SpecError("--probe-seeds means nothing without --linear-probe")
        if self.seeds == 0:
            self._check_probe_alone()

    def _check_probe_alone(self) -> None:
        if not self.linear_probe:
            raise SpecError("--seeds 0 leaves nothing to train; it is meant for --linear-probe")
        if self.robustness:
            raise SpecError("--robustness measures the networks that --seeds trains, and --seeds 0 trains none")
        named = {*self.factor, *(text.partition("=")[0] for text in self.level)}
        if others := sorted(named - {"pooling"}):
            raise SpecError(f"--seeds 0 leaves the linear probe alone, which compares poolings: {', '.join(others)} would not be varied")

    @property
    def factors(self) -> tuple[str, ...]:
        """The factors that are varied, in the order of `LEVELS`."""
        return tuple(factor for factor in LEVELS if not self.factor or factor in self.factor)

    def is_named(self, factor: str, level: str) -> bool:
        return f"{factor}={level}" in self.level

    def wanted(self, factor: str) -> tuple[str, ...]:
        """The reference's level, then the other levels that `--level` names; all of them if it names none."""
        reference, *others = LEVELS[factor]
        return (reference, *([level for level in others if self.is_named(factor, level)] or others))


@study("ablations", options=AblationOptions)
def ablations(run: RunSettings) -> Study:
    """Compare poolings, mixing augmentations and optimizers by paired trainings."""
    options: AblationOptions = run.options
    _refuse_flags_without_meaning(run)
    robustness = (_robustness_on_all_images(run),) if options.robustness else ()
    reference = reference_candidate(run, options)
    levels, notes = chosen_levels(options, reference.model)
    if run.defaults < CONVERGING and "mixpro" in levels.get("mixing", ()):
        levels["mixing"] = tuple(level for level in levels["mixing"] if level != "mixpro")
        notes.append("level mixing=mixpro is left out: this study has it on hard labels, and new trainings smooth them; use another --name")
        if len(levels["mixing"]) == 1:
            raise SettingsError(notes[-1])
    seeds = _seeds(run.seed, options.seeds)
    space = ablation_space(reference, LEVELS)
    phases = [
        Phase(
            name="train",
            space=space,
            evaluators=(*run.calls("train"), *robustness),
            objectives=("val_top1_pct",),
            propose=grid(cells(levels, seeds)),
            plan=_plan_of_cells(len(cells(levels, seeds)), f"trained for {_epochs(reference)} epochs (--epochs)"),
        )
    ]
    designs: dict[str, Design] = {}
    if options.seeds:
        designs["train"] = ablation_design(levels, reference.model, has_robustness=options.robustness)
        notes += _note_on_seeds("--seeds", options.seeds, designs["train"])
    if options.linear_probe:
        if reason := _why_not("pooling", "mean", reference.model):
            raise SettingsError(f"--linear-probe compares poolings, and {reason}")
        poolings = {"pooling": options.wanted("pooling")}
        phases += _probe_phases(run, reference, cells(poolings, _seeds(run.seed, options.probe_seeds)))
        designs["probe"] = ablation_design(poolings, reference.model, has_robustness=False)
        share = f"{100 * run.call('linear_probe').settings.subsample:g} % of the same training images"
        notes.append(f"the seeds of the linear probe share one backbone and each have {share}: its effects are those of this backbone")
        notes += _note_on_seeds("--probe-seeds", options.probe_seeds, designs["probe"])
    return Study(phases=tuple(phases), designs=designs, notes=tuple(notes))


def _refuse_flags_without_meaning(run: RunSettings) -> None:
    for name in ("num_trials", "strategy", "proxy_img_size"):
        if getattr(run, name) is not None:
            flag = "--trials" if name == "num_trials" else f"--{name.replace('_', '-')}"
            raise SettingsError(f"{flag} means nothing here: factors, levels and seeds say what is trained")
    if run.objectives:
        raise SettingsError(
            f"--objectives {','.join(run.objectives)} means nothing here: nothing is searched, every cell of the design is trained"
        )
    if not run.budget.is_empty:
        raise SettingsError(f"{run.budget} means nothing here: the design is fixed, and a bound would leave cells out of its comparisons")


def _robustness_on_all_images(run: RunSettings) -> Call:
    call = run.call("robustness")
    if call.settings.max_images:
        part = f"--set robustness.max_images={call.settings.max_images}"
        raise SettingsError(f"{part}: effects are paired by test image, so every trial must be measured on all test images")
    return call


def _note_on_seeds(flag: str, num: int, design: Design) -> list[str]:
    """A sentence if so few seeds cannot reject everything that the design tests."""
    if num >= design.num_seeds_needed:
        return []
    return [f"{flag} {num} is enough for intervals; the exact test can reject every contrast from {flag} {design.num_seeds_needed} on"]


def reference_candidate(run: RunSettings, options: AblationOptions) -> Candidate:
    """The reference candidate: every level departs from it in one thing."""
    name = options.model or ("vit_digits" if run.data == DEFAULT_DATA else "vit_cifar")
    model = resized(run.model(name), img_size=run.img_size, num_classes=run.num_classes)
    # Trained from fresh weights, a subnet is its architecture, and its parts may be exchanged.
    arch = as_arch(model)
    if arch is not None and arch.prefix is not None and arch.prefix.name == "class_token":
        arch = replace(arch, pooling=Component("class_token"))
    recipe = default_recipe(
        run,
        img_size=model.img_size,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        layer_decay=options.layer_decay,
        freeze=options.freeze,
    )
    return Candidate(model=arch or model, recipe=recipe, weights=run.weights_for(arch or model, name), label=name)


def chosen_levels(options: AblationOptions, model: Model) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The levels of each factor to compare, the reference's first, and a sentence for each that was left out.

    Raises SettingsError for a level or a factor that was named and that the model cannot have.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for factor in options.factors:
        reasons = {level: _why_not(factor, level, model) for level in options.wanted(factor)}
        for level, reason in reasons.items():
            if reason and options.is_named(factor, level):
                raise SettingsError(f"--level {factor}={level}: {reason}")
        possible = tuple(level for level, reason in reasons.items() if reason is None)
        left_out = {level: reason for level, reason in reasons.items() if reason}
        if len(possible) < 2:
            reason = next(iter(left_out.values()))
            if factor in options.factor:
                raise SettingsError(f"--factor {factor}: {reason}")
            notes.append(f"factor {factor} is left out: {reason}")
            continue
        chosen[factor] = possible
        notes += [f"level {factor}={level} is left out: {reason}" for level, reason in left_out.items()]
    if not chosen:
        raise SettingsError(f"nothing is left to compare: {'; '.join(notes)}")
    return chosen, notes


def _why_not(factor: str, level: str, model: Model) -> str | None:
    """Why the model cannot have this level; None if it can."""
    if factor == "pooling":
        arch = as_arch(model)
        if arch is None:
            return "the pooling of a timm model is fixed"
        if arch.pooling.name != "class_token":
            return "the reference pools by the class token, and the model has none"
    if factor == "mixing" and level != LEVELS[factor][0] and mixing_class(level).needs_class_row:
        return supports_class_row(model)
    return None


def ablation_space(reference: Candidate, factors: Mapping[str, Sequence[str]]) -> SearchSpace:
    """A cell is `factor`, the level on the axis of that name, and `seed`; every known level is in it, so any study can grow."""
    assert reference.recipe is not None
    base = reference.recipe

    def decode(params: Mapping[str, Any]) -> Candidate:
        factor, seed = params["factor"], params["seed"]
        level = params[factor]
        model, recipe = reference.model, replace(base, seed=seed)
        if factor == "pooling" and level != LEVELS[factor][0]:
            arch = require_arch(model, "factor pooling")
            model = replace(arch, pooling=_pooling(level, arch))
        elif factor == "mixing":
            recipe = replace(recipe, mixing=level)
        elif factor == "optimizer":
            scale = LR_SCALES[level]
            recipe = replace(
                recipe, optimizer=level, lr=base.lr * scale, min_lr=base.min_lr * scale, weight_decay=base.weight_decay / scale
            )
        return replace(reference, model=model, recipe=recipe, label=f"{factor}={level} seed {seed}")

    return SearchSpace(
        name=f"ablations/{reference.label}/{reference.model.digest[:8]}",
        axes=(
            Axis(name="factor", choices=tuple(factors)),
            *(Axis(name=factor, choices=tuple(levels), when=("factor", factor)) for factor, levels in factors.items()),
            Axis(name="seed", choices=range(MAX_SEED)),
        ),
        decode=decode,
    )


def _pooling(level: str, model: ArchSpec) -> Component:
    """The pooling of a level. Its groups are the slices of the channels that belong to the heads of the last block."""
    mixer = model.stages[-1].blocks[-1].mixer
    groups = full_choices("mixer", mixer)["num_heads"]
    powers = {
        "gem": Component("gem"),
        "ggem_frozen": Component("ggem", groups=groups, learned=False),
        "ggem": Component("ggem", groups=groups),
    }
    return powers.get(level) or Component(level)


def cells(levels: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The cells of a design, seed by seed, so that a study stopped at any moment holds paired cells."""
    return [{"factor": factor, factor: level, "seed": seed} for seed in seeds for factor, chosen in levels.items() for level in chosen]


def _seeds(first: int, num: int) -> range:
    if first + num > MAX_SEED:
        raise SettingsError(f"--seed {first} and {num} seeds: seeds go up to {MAX_SEED - 1}")
    return range(first, first + num)


def _epochs(reference: Candidate) -> int:
    assert reference.recipe is not None
    return reference.recipe.epochs


def _plan_of_cells(number: int, how: str) -> str:
    return f"{number} cells of the design, of which equal ones are measured once, each {how}"


def _probe_phases(run: RunSettings, reference: Candidate, points: Sequence[Mapping[str, Any]]) -> tuple[Phase, Phase]:
    """One training of the reference, and the poolings on its frozen tokens."""
    assert reference.recipe is not None
    recipe = reference.recipe
    name = f"ablations/{reference.label}/{reference.model.digest[:8]}/backbone"
    backbone = Phase(
        name="backbone",
        space=SearchSpace(
            name=name,
            axes=(Axis(name="seed", choices=range(MAX_SEED)),),
            decode=lambda params: replace(reference, recipe=replace(recipe, seed=params["seed"])),
        ),
        evaluators=(run.call("train"),),
        objectives=("val_top1_pct",),
        propose=grid([{"seed": run.seed}]),
        plan=f"the reference, trained once for {recipe.epochs} epochs (--epochs)",
    )
    probe = Phase(
        name="probe",
        space=ablation_space(reference, {"pooling": LEVELS["pooling"]}),
        evaluators=(run.call("linear_probe"),),
        objectives=("val_top1_pct",),
        propose=grid(points),
        plan=_plan_of_cells(len(points), "a pooling and a head trained on the frozen backbone"),
        needs=(Need("backbone"),),
    )
    return backbone, probe


def ablation_design(levels: Mapping[str, Sequence[str]], model: Model, *, has_robustness: bool) -> Design:
    """What is tested: the primary contrast of each factor, and every level against the reference."""
    from results.effects.design import Contrast, Design

    curves = [Metric(name, "maximize") for name in ROBUSTNESS if has_robustness]
    outcomes = (Metric("top1_pct", "maximize"), Metric("nll", "minimize"), *curves)
    contrasts: list[Contrast] = []
    for factor, (reference, *others) in levels.items():
        primary = _primary(factor, others, is_cnn=_is_cnn(model), has_robustness=has_robustness)
        contrasts += [primary, *_against_reference(factor, reference, others, primary)]
        if {"patch_mixing", "cutmix"} <= set(others):
            # This contrast shows what the grid gains, apart from mixing.
            contrasts.append(Contrast(factor=factor, levels=("patch_mixing",), baseline="cutmix", outcome=primary.outcome))
    return Design(name="ablations", contrasts=tuple(contrasts), outcomes=outcomes)


def _is_cnn(model: Model) -> bool:
    return as_arch(model) is None and token_size(model) is None


def _primary(factor: str, others: Sequence[str], *, is_cnn: bool, has_robustness: bool) -> Contrast:
    """The contrast that a factor is about. If its levels are not among `others`, it is the first of them against the reference.

    `published` is the lower end of the published effects: a design that can see it can see the others.
    """
    from results.effects.design import Contrast

    if factor == "pooling" and {"ggem", "mean"} <= set(others):
        source = "GGeM (https://arxiv.org/abs/2212.04114): +0.1 to +0.7 points on ImageNet-1k"
        return Contrast(factor=factor, levels=("ggem",), baseline="mean", outcome="top1_pct", is_primary=True, published=0.1, source=source)
    if factor == "mixing" and is_cnn and has_robustness and "patch_mixing" in others:
        source = "Patch Mixing (https://arxiv.org/abs/2306.17848): ConvNeXt-T, 14 x 14 grid, area between the curves read off the figure"
        return Contrast(
            factor=factor,
            levels=("patch_mixing",),
            baseline="none",
            outcome="patch_mix_fine_auc",
            is_primary=True,
            published=7.5,
            source=source,
            alternative="greater",
        )
    if factor == "mixing":
        mean = Contrast(factor=factor, levels=tuple(others), baseline="none", outcome="top1_pct", is_primary=True)
        if is_cnn or not {"mixup", "cutmix"} <= set(others):
            return mean
        source = "openmixup, third-party: DeiT-S on CIFAR-100 at 224 px, 200 epochs: Mixup +4.2, CutMix +8.3 points"
        return replace(mean, published=4.2, source=source)
    if factor == "optimizer" and "lion" in others:
        source = "Lion (https://arxiv.org/abs/2302.06675): up to 2 points for ViT on ImageNet, no lower end"
        return Contrast(factor=factor, levels=("lion",), baseline="adamw", outcome="top1_pct", is_primary=True, source=source)
    return Contrast(factor=factor, levels=(others[0],), baseline=LEVELS[factor][0], outcome="top1_pct", is_primary=True)


def _against_reference(factor: str, reference: str, others: Sequence[str], primary: Contrast) -> list[Contrast]:
    from results.effects.design import Contrast

    contrasts = [Contrast(factor=factor, levels=(level,), baseline=reference, outcome="top1_pct") for level in others]
    return [contrast for contrast in contrasts if contrast.text != primary.text]
