"""Holds ``grpo.yml``, the tuned hyperparameters in RL Zoo's format."""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
# In a wheel the file lies beside this module; in a checkout (editable install) in the top-level folder
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root / "hyperparams"))
