import re


def reward(prompts, completions, metadata):
    """Return the share of the numbers that were written before the first wrong one."""
    rewards = []
    for text, row in zip(completions, metadata, strict=True):
        right = [int(digits) for digits in row["answer"].split()]
        written = [int(digits) for digits in re.findall(r"\d{1,9}", text)]
        count = 0
        while count < min(len(right), len(written)) and written[count] == right[count]:
            count += 1
        rewards.append(count / len(right))
    return rewards
