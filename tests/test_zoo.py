"""The parts of joining the zoo that need no process of their own, and what ``train -optimize`` proposes."""

import json
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import optuna
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_grpo_plugin import GRPO, _autoload, zoo, zoo_repairs
from sb3_grpo_plugin.sampler import convert_grpo_params, sample_grpo_params


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``declare(distribution, group, line)``: metadata of a package with one entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, group: str, line: str, folder: str = "") -> None:
        info = tmp_path / folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{line}\n")
        if folder:
            monkeypatch.syspath_prepend(str(tmp_path / folder))

    return write


def zoo_package(**algos: type) -> ModuleType:
    return SimpleNamespace(ALGOS=algos)  # type: ignore[return-value]


def test_same_entry_twice_is_one(declare) -> None:
    # A distribution can be on the path twice, for example beside a build folder
    declare("twice", zoo.ALGORITHMS, "twice = stable_baselines3:PPO")
    declare("twice", zoo.ALGORITHMS, "twice = stable_baselines3:PPO", folder="again")
    assert len(zoo.declared(zoo.ALGORITHMS)["twice"]) == 1


def test_the_zoo_may_read_the_groups_itself(declare) -> None:
    declare("mine", zoo.ALGORITHMS, "mine = stable_baselines3:PPO")
    package = zoo_package(mine=PPO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.join_algorithms(package)
        zoo.join_algorithms(package)
    assert package.ALGOS == {"mine": PPO, "grpo": GRPO}


def test_two_claims_do_not_depend_on_the_order(declare) -> None:
    declare("b-first", zoo.ALGORITHMS, "claimed = stable_baselines3:PPO")
    declare("a-second", zoo.ALGORITHMS, "claimed = stable_baselines3:A2C")
    package = zoo_package()
    with pytest.warns(UserWarning, match="a-second and b-first: .*'claimed'.*uninstall all but one"):
        zoo.join_algorithms(package)
    assert set(package.ALGOS) == {"grpo"}


def test_functions_must_be_callable(declare) -> None:
    declare("odd", zoo.SAMPLERS, "odd = sys:path")
    module = SimpleNamespace(HYPERPARAMS_SAMPLER={}, HYPERPARAMS_CONVERTER={})
    with pytest.warns(UserWarning, match="odd: the entry 'odd' in 'rl_zoo3.hyperparams_sampler' is skipped .*not callable"):
        zoo.join_optimization(module)  # type: ignore[arg-type]
    assert module.HYPERPARAMS_SAMPLER == {"grpo": sample_grpo_params}
    assert module.HYPERPARAMS_CONVERTER == {"grpo": convert_grpo_params}


def test_default_config(declare, tmp_path: Path) -> None:
    assert Path(zoo.default_config("grpo") or "").name == "grpo.yml"
    assert zoo.default_config("unknown") is None
    declare("forgot", zoo.HYPERPARAMS, "forgot = email")
    with pytest.warns(UserWarning, match=r"forgot: .*there is no forgot\.yml in email"):
        assert zoo.default_config("forgot") is None
    declare("gone", zoo.HYPERPARAMS, "gone = not_a_package_at_all")
    with pytest.warns(UserWarning, match="gone: .*is no package: ModuleNotFoundError"):
        assert zoo.default_config("gone") is None


def test_the_zoos_own_config_wins(tmp_path: Path) -> None:
    class ExperimentManager:
        def __init__(self, algo: str, config: str | None = None) -> None:
            self.algo = algo
            self.config = config or str(tmp_path / f"{algo}.yml")

    module = SimpleNamespace(ExperimentManager=ExperimentManager)
    zoo.join_hyperparams(module)  # type: ignore[arg-type]
    assert ExperimentManager("grpo").config == zoo.default_config("grpo")
    # What the user names is the user's, even when it is not there
    assert ExperimentManager("grpo", config="mine.yml").config == "mine.yml"
    assert ExperimentManager("ppo").config == str(tmp_path / "ppo.yml")
    (tmp_path / "grpo.yml").write_text("")
    assert ExperimentManager("grpo").config == str(tmp_path / "grpo.yml")


def test_failing_joint_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_autoload.JOINTS, "fails", "sb3_grpo_plugin.zoo:no_such_function")
    with pytest.warns(UserWarning, match="could not join fails: AttributeError"):
        _autoload.join(ModuleType("fails"))


def test_joined_modules_are_ordinary_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "joined_module.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(_autoload.JOINTS, "joined_module", "joined_module_helper:see")
    seen = []
    helper = ModuleType("joined_module_helper")
    helper.see = lambda module: seen.append(module.VALUE)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "joined_module_helper", helper)
    # A second one does no harm
    monkeypatch.setattr(sys, "meta_path", [_autoload.JointFinder(), _autoload.JointFinder(), *sys.meta_path])
    import inspect

    import joined_module  # type: ignore[import-not-found]

    monkeypatch.delitem(sys.modules, "joined_module")
    assert seen == [1]
    assert inspect.getsource(joined_module) == "VALUE = 1\n"
    assert type(joined_module.__spec__.loader).__name__ == "SourceFileLoader"


def test_repairs_leave_mended_sources_alone() -> None:
    mended = "import sys\nsubprocess.call([sys.executable, '-m', 'rl_zoo3.record_video', *args])\n"
    assert zoo_repairs.mend_record_training(mended) == mended
    assert zoo_repairs.mend_benchmark(mended) == mended


def test_ffmpeg_of_the_machine_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: str(tmp_path / name))
    monkeypatch.setenv("PATH", "unchanged")
    zoo_repairs.offer_ffmpeg()
    assert zoo_repairs.os.environ["PATH"] == "unchanged"


@pytest.mark.parametrize("n_envs", [1, 3, 8, 16])
def test_every_proposed_trial_can_be_constructed(n_envs: int) -> None:
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")] * n_envs)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=n_envs))
    for _ in range(250):
        trial = study.ask()
        params = sample_grpo_params(trial, 0, n_envs, {})
        model = GRPO("MlpPolicy", env, device="cpu", **params)
        assert (model.n_steps, model.gamma) == (params["n_steps"], params["gamma"])
        # What a study keeps leads back to the same hyperparameters
        assert convert_grpo_params(trial.params) == params


def test_hub_repairs_end_when_upstream_is_mended() -> None:
    def generate_metadata() -> None:
        """Upstream's own."""

    mended = SimpleNamespace(generate_metadata=generate_metadata, _generate_metadata=None)
    zoo_repairs.supply_generate_metadata(mended)  # type: ignore[arg-type]
    assert mended.generate_metadata is generate_metadata
    # Neither name: nothing to build on, and the script's own ImportError says so best
    unknown = SimpleNamespace()
    zoo_repairs.supply_generate_metadata(unknown)  # type: ignore[arg-type]
    assert vars(unknown) == {}


def test_absent_normalization_is_the_error_that_the_zoo_expects() -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
    from requests import HTTPError

    class AbsentError(RemoteEntryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def load_from_hub(repo_id: str, filename: str) -> str:
        if repo_id == "no/connection":
            raise LocalEntryNotFoundError("no connection")
        raise AbsentError

    package = SimpleNamespace(load_from_hub=load_from_hub)
    zoo_repairs.let_files_be_absent(package)  # type: ignore[arg-type]
    with pytest.raises(HTTPError):
        package.load_from_hub("some/model", "vec_normalize.pkl")
    with pytest.raises(HTTPError):
        package.load_from_hub(repo_id="some/model", filename="vec_normalize.pkl")
    # A model cannot do without any other file, and nobody knows whether this one is there
    with pytest.raises(RemoteEntryNotFoundError):
        package.load_from_hub("some/model", "config.yml")
    with pytest.raises(LocalEntryNotFoundError):
        package.load_from_hub("no/connection", "vec_normalize.pkl")


CARD = """# Agent
```bash
pip install rl_zoo3
```
python -m rl_zoo3.load_from_hub --algo {algo} --env CartPole-v1 -orga somebody -f logs/
If you installed the RL Zoo3 via pip (`pip install rl_zoo3`)
## Hyperparameters
"""


@pytest.mark.parametrize("reward", ["missing/one", "a function", None])
def test_card_of_a_model(tmp_path: Path, reward: str | None) -> None:
    # As saved in the zip: JSON, with whatever JSON cannot hold as a dictionary
    saved = {"group_by": "state", "group_size": 8, "clip_range_high": None, "reward_function": reward}
    if reward == "a function":
        saved["reward_function"] = {":type:": "<class 'function'>"}
    (tmp_path / "grpo-CartPole-v1").mkdir()
    (tmp_path / "grpo-CartPole-v1" / "data").write_text(json.dumps(saved))
    readme = tmp_path / "README.md"
    readme.write_text(CARD.format(algo="grpo"))
    zoo_repairs.complete_card(readme)
    card = readme.read_text()
    assert card.count("pip install rl_zoo3 sb3-grpo-plugin") == 2
    assert "- `group_by`: `state`\n- `group_size`: `8`\n" in card
    assert "clip_range_high" not in card
    expected = {
        "missing/one": "`missing/one`. Training on needs",
        "a function": "a function of",
        None: "the environment's own",
    }
    assert f"- `reward_function`: {expected[reward]}" in card


def test_card_of_the_zoos_own_algorithms_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD.format(algo="ppo"))
    zoo_repairs.complete_card(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == CARD.format(algo="ppo")
