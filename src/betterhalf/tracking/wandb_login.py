"""The process that asks W&B whether it is logged in: exit status 0 if it is or need not be, else 1 and the reason."""

from __future__ import annotations

import sys


def main() -> int:
    """Print the reason on the last line if there is no login, and return the exit status."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode != "online" and settings.mode != "shared":
        return 0
    try:
        if wandb.login():
            return 0
        reason = f"no login for {settings.base_url}"
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    print(reason)
    return 1


if __name__ == "__main__":
    sys.exit(main())
