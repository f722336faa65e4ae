"""
The search space of ``train -optimize``: only what GRPO's constructor accepts, because the zoo stops a study at anything else.

Grouping, group size and reward are the user's to choose: they come from the yml or from ``-params`` and are left alone.
"""

from math import ceil, log2
from typing import Any

import optuna
from torch import nn

NET_ARCHS = {"tiny": [64], "small": [64, 64], "medium": [256, 256]}
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
# Visits per rollout. Fewer leave too few comparable ones in a group
MIN_ROLLOUT_POW = 10
MAX_ROLLOUT_POW = 14


def sample_grpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Propose hyperparameters for one trial, as the zoo's own samplers do.

    :param trial: asked for values
    :param n_actions: not used here
    :param n_envs: number of environments that the trial will train in
    :param additional_args: not used here
    :return: keyword arguments for GRPO
    """
    # A rollout holds n_steps * n_envs visits, and a minibatch (up to 2**10) must not be larger than a rollout
    least = max(0, ceil(MIN_ROLLOUT_POW - log2(n_envs)))
    most = max(least, int(MAX_ROLLOUT_POW - log2(n_envs)))
    params = {
        "n_steps_pow": trial.suggest_int("n_steps_pow", least, most),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 10),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        # A larger lambda lets one fragment's luck reach too far back for the group to tell it from skill
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.01, 0.3, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.002, log=True),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "clip_range": trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3, 0.4]),
        "n_epochs": trial.suggest_categorical("n_epochs", [1, 5, 10, 20]),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2),
        "scale_rewards": trial.suggest_categorical("scale_rewards", ["batch", "none"]),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
        "activation_fn": trial.suggest_categorical("activation_fn", list(ACTIVATIONS)),
    }
    hyperparams = convert_grpo_params(params)
    # What the study's tables show beside the sampled values
    for name in ("n_steps", "batch_size", "gamma", "gae_lambda"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def convert_grpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    From the values that a study keeps to GRPO's keyword arguments (also for ``--trial-id``).

    :param sampled_params: as proposed above
    :return: keyword arguments for GRPO
    """
    hyperparams = dict(sampled_params)
    for name in ("n_steps", "batch_size"):
        hyperparams[name] = 2 ** hyperparams.pop(f"{name}_pow")
    for name in ("gamma", "gae_lambda"):
        hyperparams[name] = 1 - hyperparams.pop(f"one_minus_{name}")
    hyperparams["policy_kwargs"] = {
        "net_arch": NET_ARCHS[hyperparams.pop("net_arch")],
        "activation_fn": ACTIVATIONS[hyperparams.pop("activation_fn")],
    }
    return hyperparams
