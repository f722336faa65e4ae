"""
Joins RL Zoo in the children of ``sb3-grpo zoo`` where start-up lines are not read: their PYTHONPATH names this folder.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_here = Path(__file__).resolve().parent
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != _here]
try:
    from sb3_grpo_plugin import _autoload

    _autoload.install()
except ImportError:
    # This child runs in another environment
    pass
# The sitecustomize that this one hides
_spec = PathFinder.find_spec("sitecustomize", sys.path)
if _spec is not None and _spec.loader is not None:
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["sitecustomize"] = _module
    _spec.loader.exec_module(_module)
