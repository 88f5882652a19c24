"""Samples with vLLM, a round for every line on stdin, so that it takes its turn beside others; test_sampling starts it.

    vllm_rounds.py MODEL PROMPTS.json NEW_TOKENS

Loads first and prints {"threads": n}; a round prints [[token ids, logprobs], ...] in the order of the prompts. Set up
as the teacher `vllm` is: eager, raw logprobs of the sampled tokens, a seed a request.
"""

import json
import os
import sys


def main(path: str, prompts_path: str, new_tokens: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    import torch
    import vllm

    with open(prompts_path) as file:
        prompts = [{"prompt_token_ids": ids} for ids in json.load(file)]
    llm = vllm.LLM(
        path, dtype="bfloat16", max_num_seqs=len(prompts), logprobs_mode="raw_logprobs", enforce_eager=True,
        enable_prefix_caching=False, skip_tokenizer_init=True, max_model_len=2048,
    )  # fmt: skip
    same = {"temperature": 1.0, "max_tokens": new_tokens, "ignore_eos": True, "logprobs": 0, "detokenize": False}
    how = [vllm.SamplingParams(seed=i, **same) for i in range(len(prompts))]
    print(json.dumps({"threads": torch.get_num_threads()}), file=answers, flush=True)
    for _ in sys.stdin:
        outputs = [request.outputs[0] for request in llm.generate(prompts, how, use_tqdm=False)]
        found = [
            [list(out.token_ids), [step[token].logprob for token, step in zip(out.token_ids, out.logprobs)]]  # noqa: B905
            for out in outputs
        ]
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
