"""Recipes of distill: train's sections with those of the teacher's side beside them.

    recipe = load_distill_recipe("recipes/distill.toml", ["sample.candidates=8", "mix.enabled=false"])

`[low]`, `[high]` and `[mixed]` override keys of `[train]` for the three stages of training. Relative paths are looked
up beside the recipe file, except `out`, which is relative to the working directory. ◆ marks a choice that the method's
texts leave open: the default is ours.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dasd_engine.chat import DEFAULT_SYSTEM
from dasd_engine.config import (
    CheckpointOptions,
    EvaluateOptions,
    ModelOptions,
    RunOptions,
    TrainOptions,
    beside,
    build,
    check_keys,
    check_shared,
    check_train,
    describe_keys,
    option,
    read_table,
    typed,
)
from dasd_engine.errors import InputError
from dasd_engine.filters import Filters, Repetition
from dasd_engine.mix_sampling import MixOptions
from dasd_engine.questions import GYM
from dasd_engine.selection import RULES
from dasd_engine.sources import SUFFIXES
from dasd_engine.teachers import TeacherOptions

TRAINED = ("low", "high", "mixed")


@dataclass(frozen=True)
class SampleSection:
    questions: tuple[str, ...] = option((), "files, hub data sets or gym:TASK:COUNT:SEED, as dasd_engine.sample takes")
    limit: int = option(0, "that many questions, evenly spread; 0 for all")
    candidates: int = option(4, "responses a question and temperature ◆")
    temperatures: tuple[float, float] = option((0.6, 1.0), "of stage 1 (low) and of stage 2 (high)")
    top_p: float = option(1.0, "◆")
    top_k: int = option(0, "0 for all tokens ◆")
    max_new_tokens: int = option(32768, "longest response ◆")


@dataclass(frozen=True)
class ScoreSection:
    part: Literal["all", "think", "answer"] = option("all", "sentences that are scored ◆")
    minimum_tokens: int = option(3, "a shorter sentence joins its neighbour ◆")
    tokens_per_batch: int = option(16384, "tokens of one forward pass")


@dataclass(frozen=True)
class SelectSection:
    rule: str = option("teacher_count", f"one of {', '.join(RULES)}")
    beta: float = option(0.1, "a teacher sentence has p_T − p_S above this")


@dataclass(frozen=True)
class FilterSection:
    """The context is that of [train]."""

    thinking: bool = option(True, "drop responses without a thinking part")
    right_only: bool = option(False, "keep right answers only, which the questions must have")
    repetition: bool = option(True, "drop responses that repeat themselves, by these limits ◆:")
    lines: float = option(Repetition.lines, "largest share of characters in lines said before")
    paragraphs: float = option(Repetition.paragraphs, "the same of paragraphs")
    ngrams: float = option(Repetition.ngrams, "largest share of passages of 16 words and signs said before")
    loop: int = option(Repetition.loop, "times that a passage may not come in a row")
    characters: int = option(Repetition.characters, "less repeated text than this is kept")


@dataclass(frozen=True)
class MixSection:
    enabled: bool = option(True, "false ends after stage 2")
    cap: float = option(1.5, "the student's tokens by the teacher's")
    questions: int = option(0, "a seeded choice of stage 2's, 0 for all (published: 50K)")
    temperature: float = option(1.0, "of the student ◆")
    teacher_temperature: float = option(1.0, "of the continuation ◆")
    top_p: float = option(1.0, "of both ◆")
    max_new_tokens: int = option(0, "of a continuation, 0 for what the context leaves ◆")
    ratio: tuple[float, float] = option((20.0, 7.7), "off-policy rows to mixed-policy rows")
    masked: bool = option(False, "no loss on the student's part (published as worse)")
    continuation: Literal["prefill", "instruct"] = option("prefill", "instruct: for teachers without prefill ◆")
    markers: Literal["think", "harmony"] = option("think", "how the teacher delimits its thinking; gpt-oss: harmony")
    batch_size: int = option(64, "responses of the student written together")


_SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "teacher": TeacherOptions,
    "sample": SampleSection,
    "score": ScoreSection,
    "select": SelectSection,
    "filters": FilterSection,
    "mix": MixSection,
    "run": RunOptions,
    "checkpoint": CheckpointOptions,
    "evaluate": EvaluateOptions,
}
_TOP = ("seed", "out", "system", "ranks", *_SECTIONS, "train", *TRAINED)


@dataclass(frozen=True)
class DistillRecipe:
    path: Path
    seed: int
    out: Path
    system: str
    ranks: int
    model: ModelOptions
    teacher: TeacherOptions
    sample: SampleSection
    score: ScoreSection
    select: SelectSection
    filters: FilterSection
    mix: MixSection
    run: RunOptions
    checkpoint: CheckpointOptions
    evaluate: EvaluateOptions
    train: dict[str, TrainOptions]  # of "low", "high" and "mixed"

    @property
    def student(self) -> Path:
        return self.resolve(self.model.path)

    @property
    def questions(self) -> list[str]:
        """Names as dasd_engine.questions takes them, files by their absolute paths."""
        return [str(self.resolve(name)) if self._is_file(name) else name for name in self.sample.questions]

    def _is_file(self, name: str) -> bool:
        """Not a gym task, a hub data set, or files of one (owner/name:train/*.parquet)."""
        named = name.endswith(SUFFIXES) and ":" not in name
        return not name.startswith(GYM) and (named or self.resolve(name).exists())

    def resolve(self, path: str) -> Path:
        return beside(self.path, path)

    def filters_of(self, stage: str) -> Filters:
        f = self.filters
        limits = Repetition(f.lines, f.paragraphs, f.ngrams, f.loop, f.characters) if f.repetition else None
        return Filters(self.train[stage].context, f.thinking, f.right_only, limits)

    def mix_options(self) -> MixOptions:
        m = self.mix
        return MixOptions(
            cap=m.cap, temperature=m.temperature, top_p=m.top_p, teacher_temperature=m.teacher_temperature,
            ratio=m.ratio, continuation=m.continuation, markers=m.markers, questions=m.questions,
            max_new_tokens=m.max_new_tokens, seed=self.seed, system=self.system, filters=self.filters_of("mixed"),
        )  # fmt: skip


def load_distill_recipe(path: Path | str, overrides: typing.Sequence[str] = ()) -> DistillRecipe:
    """Read a recipe and apply `section.key=value` overrides. InputError naming file, key and the nearest known key."""
    path = Path(path)
    table = read_table(path, overrides)
    check_keys(table, (*_TOP, "stage"), str(path), "")  # [[stage]] is train's: one recipe may serve both
    train = table.get("train", {})
    build(TrainOptions, train, str(path), "train")
    stages = {}
    for name in TRAINED:
        own = table.get(name, {})
        check_keys(own, [f.name for f in dataclasses.fields(TrainOptions)], str(path), name)
        published = {"epochs": 1} if name == "mixed" else {}  # ◆ whatever [train] says: six would be the other stages'
        stages[name] = build(TrainOptions, {**train, **published, **own}, str(path), name)
    sections: dict[str, Any] = {
        name: build(cls, table.get(name, {}), str(path), name) for name, cls in _SECTIONS.items()
    }
    recipe = DistillRecipe(
        path=path.resolve(),
        seed=typed(table.get("seed", 0), int, f"{path}: seed"),
        out=Path(typed(table.get("out", f"runs/{path.stem}"), str, f"{path}: out")).expanduser(),
        system=typed(table.get("system", DEFAULT_SYSTEM), str, f"{path}: system"),
        ranks=typed(table.get("ranks", 1), int, f"{path}: ranks"),
        train=stages,
        **sections,
    )
    _check(recipe)
    teacher = recipe.teacher
    if teacher.path:
        recipe = dataclasses.replace(
            recipe, teacher=dataclasses.replace(teacher, path=str(recipe.resolve(teacher.path)))
        )
    return recipe


def _check(recipe: DistillRecipe) -> None:
    """What types cannot say, and what would otherwise be found out hours later."""

    def wrong(what: str) -> InputError:
        return InputError(f"{recipe.path}: {what}")

    for section, key, meaning in (("model", "path", "the student's"), ("sample", "questions", "the questions'")):
        if not getattr(getattr(recipe, section), key):
            raise wrong(f"{section}.{key} is missing; write [{section}] with {meaning} {key}")
    teacher = recipe.teacher
    if teacher.kind == "server" and not teacher.urls:
        raise wrong('teacher.urls is missing; a server needs its base URL, e.g. urls = ["http://host:8000/v1"]')
    if teacher.kind != "server" and not teacher.path:
        raise wrong("teacher.path is missing; write [teacher] with the directory of a Hugging Face model")
    if recipe.model.init != "pretrained":
        raise wrong("model.init: a student without weights cannot score; train one first, or name one that has them")
    if recipe.select.rule not in RULES:
        raise wrong(f"select.rule = {recipe.select.rule!r}: must be one of {', '.join(RULES)}")
    low, high = recipe.sample.temperatures
    for key, good in {
        "ranks": recipe.ranks >= 1,
        "sample.temperatures": 0 <= low < high,
        "sample.candidates": recipe.sample.candidates >= 1,
        "sample.limit": recipe.sample.limit >= 0,
    }.items():
        if not good:
            section, _, name = key.rpartition(".")
            value = getattr(getattr(recipe, section) if section else recipe, name)
            raise wrong(f"{key} = {json.dumps(value)} is out of range")
    for name, options in recipe.train.items():
        check_train(options, f"{recipe.path}: {name}.")
    recipe.mix_options().check(f"{recipe.path}: mix.")
    check_shared(recipe.path, recipe.run, recipe.checkpoint, recipe.evaluate)


def describe() -> str:
    """Every recipe key with its default and meaning, for --help."""
    lines = [
        "seed = 0                             of samples, choices and the order of documents",
        'out = "runs/<recipe>"                directory of the run',
        f'system = "{DEFAULT_SYSTEM}"   system prompt of every stage',
        "ranks = 1                            processes (GPUs) of scoring and training, under torchrun",
    ]
    for section, cls in _SECTIONS.items():
        lines += [f"[{section}]", *describe_keys(cls)]
    lines += [
        "[train]  of all three stages; [low], [high] and [mixed] (epochs = 1) override it",
        *describe_keys(TrainOptions),
    ]
    return "\n".join(lines)
