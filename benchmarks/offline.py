"""vLLM without a server, for benchmarks/score.py: run under the engine's Python, one pass for each line of input.

    offline.py MODEL_FOLDER JSON_OF_LLM_ARGUMENTS

A line in is {"system": …, "prompts": […], "max_tokens": N}; a line out is {"seconds": …, "tokens": …}.
"""

import json
import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # vLLM prints
    llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        system = [{"role": "system", "content": asked["system"]}] if asked["system"] else []
        chats = [[*system, {"role": "user", "content": prompt}] for prompt in asked["prompts"]]
        sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True)
        started = time.perf_counter()
        outputs = llm.chat(chats, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
