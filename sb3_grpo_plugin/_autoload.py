"""
Lets our functions see RL Zoo's modules right after they were executed, and before anybody uses them.

Imported when ``rl_zoo3`` is about to be imported (by the start-up line, see ``pyproject.toml``), or by
:func:`sb3_grpo_plugin.zoo.register`.
Nothing but the standard library, and no module of this package before the zoo has loaded the one that it joins.
"""

import os
import sys
import warnings
from importlib import import_module
from types import CodeType, ModuleType
from typing import Any

# Module of the zoo, or one that it imports -> our function, called with that module after its execution
JOINTS = {
    "rl_zoo3": "sb3_grpo_plugin.zoo:join_algorithms",
    "rl_zoo3.exp_manager": "sb3_grpo_plugin.zoo:join_hyperparams",
    "rl_zoo3.hyperparams_opt": "sb3_grpo_plugin.zoo:join_optimization",
    "huggingface_sb3": "sb3_grpo_plugin.zoo_repairs:let_files_be_absent",
    "huggingface_sb3.push_to_hub": "sb3_grpo_plugin.zoo_repairs:supply_generate_metadata",
}
# Script of the zoo -> our function that mends its source. As __main__ it is beyond the reach of a joint
SCRIPTS = {
    "rl_zoo3.benchmark": "sb3_grpo_plugin.zoo_repairs:mend_benchmark",
    "rl_zoo3.record_training": "sb3_grpo_plugin.zoo_repairs:mend_record_training",
    "rl_zoo3.push_to_hub": "sb3_grpo_plugin.zoo_repairs:mend_push_to_hub",
}

_joined: dict[str, ModuleType] = {}


def start() -> None:
    """
    What the start-up line calls when ``rl_zoo3`` is about to be imported.
    """
    if os.environ.get("SB3_GRPO_AUTOLOAD") != "0":
        install()


def waiting() -> list[int]:
    """
    :return: places of the start-up line's function in front of the import system; it is its own ``find_spec``
    """
    return [index for index, finder in enumerate(sys.meta_path) if getattr(finder, "find_spec", None) is finder]


def install() -> None:
    """
    Watch for the modules above, and join those that are there already. Calling it again changes nothing.
    """
    if not any(isinstance(finder, JointFinder) for finder in sys.meta_path):
        # Right behind the start-up line's function: while that one runs, the import system is walking this very list, and
        # would not come back to an earlier place for `rl_zoo3`
        places = waiting()
        sys.meta_path.insert(places[0] + 1 if places else 0, JointFinder())
    for name in JOINTS:
        if name in sys.modules:
            join(sys.modules[name])


def join(module: ModuleType) -> None:
    """
    Call our function for a module, once. A failure is a warning: the zoo goes on without what is missing.

    :param module: one of the modules in ``JOINTS``, executed
    """
    name = module.__name__
    if _joined.get(name) is module:
        return
    _joined[name] = module
    try:
        _resolve(JOINTS[name])(module)
    except Exception as error:
        warnings.warn(f"sb3-grpo-plugin could not join {name}: {error!r}", stacklevel=2)


def _resolve(target: str) -> Any:
    module, _, function = target.partition(":")
    return getattr(import_module(module), function)


class JointFinder:
    """
    Finds nothing by itself: takes what the other finders find, and puts a ``JointLoader`` around its loader.
    """

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name not in JOINTS and name not in SCRIPTS:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            # Two of us, for whatever reason, must not ask each other
            if find_spec is None or isinstance(finder, JointFinder):
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = JointLoader(spec.loader)
                return spec
        return None


class JointLoader:
    """
    A module's own loader, with our function called after the module's execution, or before it on its source.

    :param loader: the loader that does the work, and answers whatever else is asked
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loader.create_module(spec)

    def get_code(self, name: str) -> CodeType | None:
        """
        The code of a script, as ``python -m`` asks for it.

        :param name: the module's full name
        :return: the mended code; the loader's own where there is nothing to mend
        """
        code = self.loader.get_code(name)
        if name not in SCRIPTS or code is None:
            return code
        try:
            source = self.loader.get_source(name)
            mended = _resolve(SCRIPTS[name])(source)
            return code if mended == source else compile(mended, code.co_filename, "exec", dont_inherit=True)
        except Exception as error:
            warnings.warn(f"sb3-grpo-plugin could not mend {name}: {error!r}", stacklevel=2)
            return code

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        # From here on the module is an ordinary one, for inspect, reload and whoever else asks for its loader
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        code = self.get_code(name) if name in SCRIPTS else None
        if code is not None:
            exec(code, module.__dict__)
        else:
            self.loader.exec_module(module)
        if name in JOINTS:
            join(module)
