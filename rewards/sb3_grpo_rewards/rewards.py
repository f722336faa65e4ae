"""
Reward functions ``reward(state, action, next_state) -> reward [B]`` for gymnasium's environments.

An alternative that terminates stops earning, and so does an episode. Where ending is the aim (mountain cars, Acrobot)
every step therefore costs something, and a good state costs less; where ending is the failure (CartPole, walkers) a
step earns something.
"""

import torch as th


def cartpole_upright(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    1 - |pole angle| - 0.1 |cart position| of the next state (rad, m).

    :param state: ``[B, 4]``, not read
    :param action: int64 ``[B, 1]``, not read
    :param next_state: ``[B, 4]``: position, velocity, pole angle, angular velocity
    :return: ``[B]``
    """
    return 1 - next_state[:, 2].abs() - 0.1 * next_state[:, 0].abs()


def acrobot_swing_up(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    The cost of a step: half for the height that the tip lacks to the goal line, half for the energy that both links
    lack to stand upright. Height alone learns too, energy alone keeps no aim; the two together learn fastest.

    :param state: ``[B, 6]``, not read
    :param action: int64 ``[B, 1]``, not read
    :param next_state: ``[B, 6]``: cosine and sine of both angles (the second relative to the first), two angular
        velocities (rad/s)
    :return: ``[B]``, -1 (hanging at rest) to 0
    """
    cosine_1, sine_1, cosine_2, sine_2, spin_1, spin_2 = next_state.unbind(1)
    elbow = -cosine_1
    tip = elbow - (cosine_1 * cosine_2 - sine_1 * sine_2)
    # links of 1 kg and 1 m, centres of mass at 0.5 m, moments of inertia 1 kg m^2
    potential = 9.8 * (elbow + 0.5 * tip)
    kinetic = 0.5 * (3.5 + cosine_2) * spin_1.square() + (1.25 + 0.5 * cosine_2) * spin_1 * spin_2 + 0.625 * spin_2.square()
    upright = 9.8 * 2
    lacking_energy = ((potential + kinetic - upright) / (2 * upright)).clamp(max=0)
    lacking_height = ((tip - 1) / 3).clamp(max=0)
    return 0.5 * (lacking_energy + lacking_height)


def _car_lacking_energy(state: th.Tensor) -> th.Tensor:
    """
    The energy that the mountain car lacks to roll to the top of the hill.

    :param state: ``[B, 2]``: position and velocity (per step)
    :return: ``[B]``: -1 at rest in the valley, 0 with enough of it
    """
    position, velocity = state.unbind(1)
    gravity = 0.0025  # the slope pulls with -gravity * cos(3 * position)
    return (((3 * position).sin() - 1) / 2 + velocity.square() * (0.75 / gravity)).clamp(max=0)


def mountain_car_energy(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    The cost of a step: 0.1, and up to 1 for the energy that the car lacks to roll to the top.

    :param state: ``[B, 2]``, not read
    :param action: int64 ``[B, 1]``, not read
    :param next_state: ``[B, 2]``: position and velocity (per step)
    :return: ``[B]``, -1.1 to -0.1
    """
    return _car_lacking_energy(next_state) - 0.1


def mountain_car_continuous_energy(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    As ``mountain_car_energy``, and the environment's own price of the force.

    :param state: ``[B, 2]``, not read
    :param action: float32 ``[B, 1]``: the force, -1 to 1
    :param next_state: ``[B, 2]``: position and velocity (per step)
    :return: ``[B]``, -1.2 to -0.1
    """
    return _car_lacking_energy(next_state) - 0.1 - 0.1 * action[:, 0].square()


def pendulum_cost(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    The environment's own: -(angle^2 + 0.1 angular velocity^2 + 0.001 torque^2), of the state before the step.

    :param state: ``[B, 3]``: cosine and sine of the angle (0 is upright), angular velocity (rad/s)
    :param action: float32 ``[B, 1]``: torque (N m), cut off at 2
    :param next_state: ``[B, 3]``, not read
    :return: ``[B]``
    """
    angle = th.atan2(state[:, 1], state[:, 0])
    return -(angle.square() + 0.1 * state[:, 2].square() + 0.001 * action[:, 0].clamp(-2, 2).square())


def lander_landing(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    LunarLander's own progress towards the pad less its price of fuel, for discrete and continuous actions; -100 for
    leaving the screen, and for an impact. An observation does not tell a crash from a hard landing: both change the
    velocity by more than 0.3 in one step, where the engines reach 0.1. The +100 of the final rest is missing.

    :param state: ``[B, 8]``: position, velocity, angle, angular velocity, contact of both legs
    :param action: int64 ``[B, 1]`` (0 nothing, 1 left, 2 main, 3 right engine) or float32 ``[B, 2]`` (main, side)
    :param next_state: ``[B, 8]``
    :return: ``[B]``
    """
    if action.is_floating_point():
        main, side = action.clamp(-1, 1).unbind(1)
        fuel = th.where(main > 0, 0.15 * (main + 1), 0.0) + th.where(side.abs() > 0.5, 0.03 * side.abs(), 0.0)
    else:
        engine = action[:, 0]
        fuel = 0.3 * (engine == 2) + 0.03 * ((engine == 1) | (engine == 3))
    progress = _lander_potential(next_state) - _lander_potential(state)
    impact = (next_state[:, 2:4] - state[:, 2:4]).norm(dim=1) > 0.3
    return th.where(impact | (next_state[:, 0].abs() >= 1), -100.0, progress - fuel.to(progress.dtype))


def _lander_potential(state: th.Tensor) -> th.Tensor:
    """
    :param state: ``[B, 8]``
    :return: ``[B]``, higher when nearer to the pad, slower, upright, and with the legs on the ground
    """
    distance, speed = state[:, :2].norm(dim=1), state[:, 2:4].norm(dim=1)
    return -100 * (distance + speed + state[:, 4].abs()) + 10 * (state[:, 6] + state[:, 7])


def _forward(action: th.Tensor, next_state: th.Tensor, velocity: int, control: float, speed: float = 1.0) -> th.Tensor:
    """
    Forward speed less the price of control, as MuJoCo's walkers are paid.

    :param action: float32 ``[B, action_dim]``
    :param next_state: ``[B, n]``
    :param velocity: index of the forward velocity (m/s) in the observation
    :param control: price of one unit of squared action
    :param speed: reward for 1 m/s
    :return: ``[B]``
    """
    return speed * next_state[:, velocity] - control * action.square().sum(dim=1)


def hopper_forward(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    Forward speed + 1 while upright (z > 0.7 m, |angle| < 0.2 rad) - 0.001 |action|^2.

    The environment pays the mean speed over its control step, this function the speed at its end; so do the others.

    :param state: ``[B, 11]``, not read
    :param action: float32 ``[B, 3]``
    :param next_state: ``[B, 11]``: z, angle, three joints, six velocities
    :return: ``[B]``
    """
    healthy = (next_state[:, 0] > 0.7) & (next_state[:, 1].abs() < 0.2)
    return _forward(action, next_state, velocity=5, control=1e-3) + healthy


def half_cheetah_forward(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    Forward speed - 0.1 |action|^2.

    :param state: ``[B, 17]``, not read
    :param action: float32 ``[B, 6]``
    :param next_state: ``[B, 17]``: z, angle, six joints, nine velocities
    :return: ``[B]``
    """
    return _forward(action, next_state, velocity=8, control=0.1)


def walker2d_forward(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    Forward speed + 1 while upright (0.8 < z < 2 m, |angle| < 1 rad) - 0.001 |action|^2.

    :param state: ``[B, 17]``, not read
    :param action: float32 ``[B, 6]``
    :param next_state: ``[B, 17]``: z, angle, six joints, nine velocities
    :return: ``[B]``
    """
    height, angle = next_state[:, 0], next_state[:, 1]
    healthy = (height > 0.8) & (height < 2) & (angle.abs() < 1)
    return _forward(action, next_state, velocity=8, control=1e-3) + healthy


def ant_forward(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    Forward speed + 1 while healthy (0.2 <= z <= 1 m) - 0.5 |action|^2 - 0.0005 |contact forces|^2, the last where the
    observation holds them (v5).

    :param state: ``[B, 27]`` or ``[B, 105]``, not read
    :param action: float32 ``[B, 8]``
    :param next_state: ``[B, 27]`` or ``[B, 105]``: z, orientation, eight joints, fourteen velocities, contact forces
    :return: ``[B]``
    """
    healthy = (next_state[:, 0] >= 0.2) & (next_state[:, 0] <= 1)
    contact = 5e-4 * next_state[:, 27:].square().sum(dim=1)
    return _forward(action, next_state, velocity=13, control=0.5) + healthy - contact


def humanoid_forward(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    1.25 forward speed + 5 while upright (1 < z < 2 m) - 0.1 |action|^2. The speed is the torso's, where the environment
    pays the centre of mass; its small price of contact forces is left out.

    :param state: ``[B, 348]`` or ``[B, 376]``, not read
    :param action: float32 ``[B, 17]``
    :param next_state: ``[B, 348]`` or ``[B, 376]``: z, orientation, seventeen joints, 23 velocities, more
    :return: ``[B]``
    """
    healthy = (next_state[:, 0] > 1) & (next_state[:, 0] < 2)
    return _forward(action, next_state, velocity=22, control=0.1, speed=1.25) + 5 * healthy


def swimmer_forward(state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
    """
    Forward speed - 0.0001 |action|^2.

    :param state: ``[B, 8]``, not read
    :param action: float32 ``[B, 2]``
    :param next_state: ``[B, 8]``: angle, two joints, five velocities
    :return: ``[B]``
    """
    return _forward(action, next_state, velocity=3, control=1e-4)
