import re

import reasoning_gym

scorer = reasoning_gym.create_dataset("basic_arithmetic", size=1, seed=0)


def reward(prompts, completions, metadata):
    rewards = []
    for text, row in zip(completions, metadata, strict=True):
        found = re.findall(r"\d+", text) if row["finish_reason"] == "stop" else []
        rewards.append(scorer.score_answer(found[-1] if found else None, row))
    return rewards
