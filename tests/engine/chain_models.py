"""Models whose next token depends on the last one alone, as written down here: real weights that no training made.

They answer `<think>3+4=7⏎5-2=3⏎</think>B`: well-formed responses of random length, from the engine's own decoder. The
one layer adds nothing at first (its output projections are 0), embeddings are one-hot, the head holds the log-odds.
"""

import json
import shutil
from pathlib import Path

import torch

from dasd_engine.hf import init_weights, save_model
from dasd_engine.model import Decoder
from dasd_engine.model_config import read_config

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart" / "student"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + message.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
OPENING = TEMPLATE.replace("'<|im_start|>assistant' }}{% endif", "'<|im_start|>assistant<think>' }}{% endif")
DIGITS = "123456789"
NEWLINE = "\u010a"  # as a byte-level vocabulary writes it


def write_chain(path: Path, end: float, template: str = TEMPLATE, positions: int = 512, letters: str = "ABCD") -> Path:
    """A model directory; `end` is the probability that a sentence is the last one of the thinking."""
    tokenizer = _side_files(path, template, positions)
    then: dict[str, dict[str, float]] = {
        tokenizer.id_to_token(tokenizer.encode("assistant", add_special_tokens=False).ids[-1]): {"<think>": 1.0},
        "<think>": dict.fromkeys(DIGITS, 1 / 9),
        **{op: dict.fromkeys(DIGITS, 1 / 9) for op in "+-="},
        **{digit: {"+": 0.25, "-": 0.2, "=": 0.15, NEWLINE: 0.4} for digit in DIGITS},
        NEWLINE: {"</think>": end, **dict.fromkeys(DIGITS, (1 - end) / 9)},
        "</think>": dict.fromkeys(letters, 1 / len(letters)),
        **{letter: {"<|im_end|>": 1.0} for letter in "ABCD"},
    }
    config = read_config(path)
    model = Decoder(config)
    init_weights(model, 0)
    state = model.state_dict()
    with torch.no_grad():
        state["embed_tokens.weight"].copy_(torch.eye(config.vocab_size))
        for name, weight in state.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        model.head_weight.fill_(-1.0)
        scale = config.hidden_size**0.5  # what the last norm makes of a one-hot row
        for last, distribution in then.items():
            for token, probability in distribution.items():
                logit = torch.tensor(probability).log() + 12.0  # what has no row here has -24 and more below
                model.head_weight[tokenizer.token_to_id(token), tokenizer.token_to_id(last)] = logit / scale
    save_model(model, path / "weights", dtype=torch.float32, source=path)
    for file in (path / "weights").glob("*.safetensors*"):
        file.rename(path / file.name)
    shutil.rmtree(path / "weights")
    return path


def _side_files(path: Path, template: str, positions: int):
    from tokenizers import Tokenizer

    path.mkdir(parents=True)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(QUICKSTART / name, path)
    config = json.loads((QUICKSTART / "config.json").read_text())
    small = {"hidden_size": config["vocab_size"], "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 32,
             "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
             "max_position_embeddings": positions}  # fmt: skip
    (path / "config.json").write_text(json.dumps({**config, **small}))
    settings = json.loads((QUICKSTART / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def write_questions(path: Path, count: int) -> Path:
    """Rows with an answer, as sample and evaluate read them."""
    rows = [
        {"uuid": f"q{i}", "input": f"Say a letter. {i}", "domain": "letters",
         "meta": json.dumps({"answer": "ABCD"[i % 4], "task": "letters"})}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
