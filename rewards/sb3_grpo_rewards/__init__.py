"""Rewards and transition models for gymnasium's environments, offered to sb3-grpo-plugin through its public hooks."""

from sb3_grpo_plugin import RewardSpec, TransitionSpec, hookimpl
from sb3_grpo_rewards import models, rewards

CARTPOLE = ("CartPole-v0", "CartPole-v1")


def _walker(name: str) -> tuple[str, ...]:
    # v2 and v3 need mujoco-py, which gymnasium no longer runs
    return (f"{name}-v4", f"{name}-v5")


@hookimpl
def sb3_grpo_rewards() -> list[RewardSpec]:
    """
    :return: our rewards; one per environment, so that ``reward_function="auto"`` finds it
    """
    lander = ("LunarLander-v3", "LunarLanderContinuous-v3")
    return [
        RewardSpec("classic/cartpole-upright", CARTPOLE, rewards.cartpole_upright, "pole upright, cart in the middle"),
        RewardSpec("classic/acrobot-swing-up", ("Acrobot-v1",), rewards.acrobot_swing_up, "tip height and energy"),
        RewardSpec("classic/mountain-car-energy", ("MountainCar-v0",), rewards.mountain_car_energy, "energy to the top"),
        RewardSpec(
            "classic/mountain-car-continuous-energy",
            ("MountainCarContinuous-v0",),
            rewards.mountain_car_continuous_energy,
            "energy to the top, less the price of the force",
        ),
        RewardSpec("classic/pendulum-cost", ("Pendulum-v1",), rewards.pendulum_cost, "the environment's own reward"),
        RewardSpec("box2d/lander-landing", lander, rewards.lander_landing, "progress to the pad, less fuel and impacts"),
        RewardSpec("mujoco/hopper-forward", _walker("Hopper"), rewards.hopper_forward, "forward speed, upright"),
        RewardSpec("mujoco/half-cheetah-forward", _walker("HalfCheetah"), rewards.half_cheetah_forward, "forward speed"),
        RewardSpec("mujoco/walker2d-forward", _walker("Walker2d"), rewards.walker2d_forward, "forward speed, upright"),
        RewardSpec("mujoco/ant-forward", _walker("Ant"), rewards.ant_forward, "forward speed, healthy"),
        RewardSpec("mujoco/humanoid-forward", _walker("Humanoid"), rewards.humanoid_forward, "forward speed, upright"),
        RewardSpec("mujoco/swimmer-forward", _walker("Swimmer"), rewards.swimmer_forward, "forward speed"),
    ]


@hookimpl
def sb3_grpo_transitions() -> list[TransitionSpec]:
    """
    :return: exact models of the classic-control environments
    """
    return [
        TransitionSpec("classic/cartpole", CARTPOLE, models.cartpole, "explicit Euler"),
        TransitionSpec("classic/acrobot", ("Acrobot-v1",), models.acrobot, "Runge-Kutta, fourth order"),
        TransitionSpec("classic/mountain-car", ("MountainCar-v0",), models.mountain_car, "exact"),
        TransitionSpec(
            "classic/mountain-car-continuous", ("MountainCarContinuous-v0",), models.mountain_car_continuous, "exact"
        ),
        TransitionSpec("classic/pendulum", ("Pendulum-v1",), models.pendulum, "exact"),
    ]
