# Runs when `rl_zoo3` is about to be imported, from the start-up line (see pyproject.toml), which holds this text.
import os

if os.environ.get("SB3_GRPO_AUTOLOAD") != "0":
    try:
        from sb3_grpo_plugin import _autoload

        _autoload.install()
    except Exception as error:  # for example: the checkout of an editable install was moved away
        import sys

        print(f"sb3-grpo-plugin: RL Zoo starts without it: {error!r}", file=sys.stderr)
