"""A whole distillation for tests: two chain models, a dozen questions, a recipe of some seconds on one core."""

from pathlib import Path

from chain_models import write_chain, write_questions

RECIPE = """
seed = 1
out = "{out}"

[model]
path = "student"

[teacher]
path = "teacher"
threads = 1

[sample]
questions = ["questions.jsonl"]
candidates = 2
max_new_tokens = 120

[train]
context = 192
packs_per_step = 4
epochs = 2
lr = 1e-4
min_lr = 1e-5

[high]
epochs = 1

[mix]
ratio = [2.0, 1.0]

[run]
threads = 1
compute = "fp32"

[evaluate]
problems = "problems.jsonl"
samples = 2
temperature = 1.0
max_new_tokens = 40
"""


def write_distillation(path: Path, questions: int = 12) -> Path:
    """`path`/recipe.toml with its models and questions beside it and `path`/run as its `out`."""
    path.mkdir(parents=True, exist_ok=True)
    write_chain(path / "student", 0.12)
    write_chain(path / "teacher", 0.45, letters="AB")
    write_questions(path / "questions.jsonl", questions)
    write_questions(path / "problems.jsonl", 4)
    (path / "recipe.toml").write_text(RECIPE.format(out=path / "run"))
    return path / "recipe.toml"
