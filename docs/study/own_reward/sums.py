"""Write sums.jsonl: one-digit sums of reasoning-gym, each question once."""

import json

import reasoning_gym

SETTINGS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "operators": ["+"]}
PLAIN = {"allow_negation": False, "allow_parentheses": False}
data = reasoning_gym.create_dataset("basic_arithmetic", size=600, seed=42, **SETTINGS, **PLAIN)
rows = {row["question"]: row for row in data}
with open("sums.jsonl", "w") as file:
    for row in rows.values():
        file.write(json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n")
