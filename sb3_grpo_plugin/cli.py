"""
The ``sb3-grpo`` command. A subcommand is a function of the arguments behind its name, imported when it is asked for.
"""

import argparse
import difflib
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sb3_grpo_plugin import __version__, _autoload


class Command(NamedTuple):
    """
    :param module: where the function is; a module that is not there takes its subcommand with it
    :param function: ``function(arguments) -> exit status`` (``None`` is 0)
    :param help: one line
    """

    module: str
    function: str
    help: str


COMMANDS = {
    "zoo": Command(
        "sb3_grpo_plugin.cli", "zoo_command", "run a script of RL Zoo: sb3-grpo zoo train --algo grpo --env CartPole-v1"
    ),
    "plugins": Command("sb3_grpo_plugin.commands", "plugins_command", "list the installed plugins and what they offer"),
    "rewards": Command(
        "sb3_grpo_plugin.commands", "rewards_command", "list the reward functions, of one environment with --env ID"
    ),
    "new-plugin": Command("sb3_grpo_plugin.commands", "new_plugin_command", "start a plugin package of your own"),
    "benchmark": Command("sb3_grpo_plugin.benchmark", "benchmark_command", "compare algorithms over environments and seeds"),
    "serve": Command("sb3_grpo_plugin.api", "serve_command", "serve the web API"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    :param argv: the arguments, those of this process by default
    :return: exit status
    """
    commands = {name: command for name, command in COMMANDS.items() if find_spec(command.module) is not None}
    parser = argparse.ArgumentParser(
        prog="sb3-grpo",
        description="Critic-free GRPO for Stable-Baselines3 and RL Zoo.",
        epilog="commands:\n" + "\n".join(f"  {name:<12}{command.help}" for name, command in commands.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sb3-grpo-plugin {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=list(commands), help="one of the commands below")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="see `sb3-grpo COMMAND --help`")
    args = parser.parse_args(argv)
    command = commands[args.command]
    return getattr(import_module(command.module), command.function)(args.arguments) or 0


def zoo_scripts() -> list[str]:
    """
    :return: names of the zoo's modules that can be run, such as ``train`` and ``plots.all_plots``
    """
    spec = find_spec("rl_zoo3")
    assert spec is not None and spec.submodule_search_locations is not None
    names = []
    for folder in spec.submodule_search_locations:
        for prefix in ("", "plots."):
            for module in pkgutil.iter_modules([str(Path(folder, *prefix.split(".")))]):
                path = Path(folder, *prefix.split("."), f"{module.name}.py")
                if path.is_file() and ".parse_args(" in path.read_text(encoding="utf-8"):
                    names.append(prefix + module.name)
    return sorted(names)


def zoo_command(arguments: Sequence[str]) -> int:
    """
    Run ``python -m rl_zoo3.SCRIPT`` after joining the zoo, here and in child processes, whatever start-up lines do.

    :param arguments: the script's name and its arguments
    :return: exit status
    """
    scripts = zoo_scripts()
    parser = argparse.ArgumentParser(
        prog="sb3-grpo zoo",
        description="Run `python -m rl_zoo3.SCRIPT` with the algorithms of installed packages, also where start-up lines "
        "(.pth files) are not read or SB3_GRPO_AUTOLOAD=0 turns ours off.",
    )
    parser.add_argument("script", metavar="SCRIPT", help=", ".join(scripts))
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the script's own arguments")
    args = parser.parse_args(arguments)
    if args.script not in scripts:
        nearest = difflib.get_close_matches(args.script, scripts, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose from {', '.join(scripts)}"
        parser.error(f"RL Zoo has no script {args.script!r}; {hint}")

    from sb3_grpo_plugin.zoo import register

    register()
    _join_children()
    sys.argv[1:] = args.arguments
    runpy.run_module(f"rl_zoo3.{args.script}", run_name="__main__", alter_sys=True)
    return 0


def _join_children() -> None:
    """Let interpreters that this one starts join the zoo too."""
    # Asking for this command by name outweighs the switch
    os.environ.pop("SB3_GRPO_AUTOLOAD", None)
    # Where the start-up line did not run here, it will not run in children either
    if not _autoload.waiting():
        paths = [str(Path(__file__).parent / "_children"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
