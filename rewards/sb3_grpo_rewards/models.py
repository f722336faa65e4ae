"""
Gymnasium's classic-control environments as batched transition models: ``model(state, action) -> (next_state,
terminated)`` for a whole batch, on any device, in the dtype of ``state``.

The equations and constants are those of the environments (gymnasium 1.x, default arguments), written for columns of
tensors. What an environment does at its borders (clipping, the wall of the mountain car) is part of the model; time
limits are not.
"""

import math

import torch as th


def columns(state: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    :param state: ``[B, n]``
    :return: its ``n`` columns ``[B]``, each contiguous: element-wise operations on strided columns are several times
        slower, and the transposition costs nothing when ``state`` came from ``join``
    """
    return state.t().contiguous().unbind()


def join(*rows: th.Tensor) -> th.Tensor:
    """
    :param rows: ``n`` tensors ``[B]``
    :return: ``[B, n]``, a transposed view of contiguous rows
    """
    return th.stack(rows).t()


CARTPOLE_TAU = 0.02  # seconds between steps
CARTPOLE_GRAVITY = 9.8
CARTPOLE_MASS_POLE = 0.1
CARTPOLE_MASS = 1.1  # cart and pole
CARTPOLE_HALF_LENGTH = 0.5
CARTPOLE_FORCE = 10.0
CARTPOLE_MAX_ANGLE = 12 * 2 * math.pi / 360
CARTPOLE_MAX_POSITION = 2.4


def cartpole(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    CartPole-v0 and CartPole-v1: explicit Euler integration.

    :param state: ``[B, 4]``: position (m), velocity (m/s), pole angle (rad), angular velocity (rad/s)
    :param action: int64 ``[B, 1]``: 0 pushes to the left, 1 to the right
    :return: next state ``[B, 4]``; terminated, bool ``[B]``: more than 2.4 m or 12 degrees from the middle
    """
    _, velocity, angle, spin = columns(state)
    force = action[:, 0].to(state.dtype).mul(2 * CARTPOLE_FORCE / CARTPOLE_MASS).sub_(CARTPOLE_FORCE / CARTPOLE_MASS)
    sine, cosine = angle.sin(), angle.cos()
    pole_ratio = CARTPOLE_MASS_POLE * CARTPOLE_HALF_LENGTH / CARTPOLE_MASS
    pull = spin.square().mul_(sine).mul_(pole_ratio).add_(force)
    inertia = cosine.square().mul_(-CARTPOLE_HALF_LENGTH * CARTPOLE_MASS_POLE / CARTPOLE_MASS)
    inertia.add_(CARTPOLE_HALF_LENGTH * 4.0 / 3.0)
    spin_up = sine.mul_(CARTPOLE_GRAVITY).addcmul_(cosine, pull, value=-1).div_(inertia)
    speed_up = pull.addcmul_(spin_up, cosine, value=-pole_ratio)
    next_state = th.stack((velocity, speed_up, spin, spin_up)).mul_(CARTPOLE_TAU).add_(state.t())
    terminated = (next_state[0].abs() > CARTPOLE_MAX_POSITION).logical_or_(next_state[2].abs() > CARTPOLE_MAX_ANGLE)
    return next_state.t(), terminated


ACROBOT_STEP = 0.2  # seconds
ACROBOT_MAX_SPIN_1 = 4 * math.pi
ACROBOT_MAX_SPIN_2 = 9 * math.pi


def _acrobot_derivative(
    angle_1: th.Tensor, angle_2: th.Tensor, spin_1: th.Tensor, spin_2: th.Tensor, torque: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """
    The book's equations for two links of 1 kg, 1 m, centres of mass at 0.5 m and moments of inertia 1 kg m^2.

    :param angle_1: of the first link, 0 hangs down (rad), ``[B]``; likewise the others
    :param torque: on the joint between the links (N m), ``[B]``
    :return: time derivatives of the two angles and of the two angular velocities
    """
    gravity = 9.8
    sine, cosine = angle_2.sin(), angle_2.cos()
    d1 = 3.5 + cosine
    d2 = 1.25 + 0.5 * cosine
    phi2 = 0.5 * gravity * (angle_1 + angle_2).sin()
    phi1 = -0.5 * sine * spin_2 * (spin_2 + 2 * spin_1) + 1.5 * gravity * angle_1.sin() + phi2
    ratio = d2 / d1
    pull_2 = (torque + ratio * phi1 - 0.5 * spin_1.square() * sine - phi2) / (1.25 - ratio * d2)
    pull_1 = -(d2 * pull_2 + phi1) / d1
    return spin_1, spin_2, pull_1, pull_2


def acrobot(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Acrobot-v1: one Runge-Kutta step of fourth order.

    In float32 the error of a step is below 1e-5 up to half of the speed limits. At the limits a step magnifies rounding
    to 1e-3 (0.1 % of the states there): pass float64 where that matters.

    :param state: ``[B, 6]``: cosine and sine of the first angle, of the second (relative to the first), and the two
        angular velocities (rad/s)
    :param action: int64 ``[B, 1]``: torque -1, 0 or 1 N m
    :return: next state ``[B, 6]``; terminated, bool ``[B]``: the tip is more than 1 m above the first joint
    """
    cosine_1, sine_1, cosine_2, sine_2, spin_1, spin_2 = columns(state)
    start = (th.atan2(sine_1, cosine_1), th.atan2(sine_2, cosine_2), spin_1, spin_2)
    torque = action[:, 0].to(state.dtype) - 1
    slope = _acrobot_derivative(*start, torque)
    total: tuple[th.Tensor, ...] = slope
    for fraction, weight in ((0.5, 2), (0.5, 2), (1.0, 1)):
        midway = [value + fraction * ACROBOT_STEP * rate for value, rate in zip(start, slope, strict=True)]
        slope = _acrobot_derivative(midway[0], midway[1], midway[2], midway[3], torque)
        total = tuple(old + weight * new for old, new in zip(total, slope, strict=True))
    angle_1, angle_2, spin_1, spin_2 = (value + ACROBOT_STEP / 6 * rate for value, rate in zip(start, total, strict=True))
    spin_1 = spin_1.clamp(-ACROBOT_MAX_SPIN_1, ACROBOT_MAX_SPIN_1)
    spin_2 = spin_2.clamp(-ACROBOT_MAX_SPIN_2, ACROBOT_MAX_SPIN_2)
    terminated = -angle_1.cos() - (angle_1 + angle_2).cos() > 1
    return join(angle_1.cos(), angle_1.sin(), angle_2.cos(), angle_2.sin(), spin_1, spin_2), terminated


CAR_MIN_POSITION = -1.2
CAR_MAX_POSITION = 0.6
CAR_MAX_VELOCITY = 0.07
CAR_GRAVITY = 0.0025


def _drive(state: th.Tensor, push: th.Tensor, goal: float) -> tuple[th.Tensor, th.Tensor]:
    """
    The valley that both mountain cars share; the wall on the left stops the car.

    :param state: ``[B, 2]``: position and velocity (per step)
    :param push: change of velocity by the engine, ``[B]``
    :param goal: the position to reach
    :return: next state ``[B, 2]``; terminated, bool ``[B]``
    """
    position, velocity = columns(state)
    velocity = (velocity + push - CAR_GRAVITY * (3 * position).cos()).clamp(-CAR_MAX_VELOCITY, CAR_MAX_VELOCITY)
    position = (position + velocity).clamp(CAR_MIN_POSITION, CAR_MAX_POSITION)
    velocity = th.where((position <= CAR_MIN_POSITION) & (velocity < 0), 0.0, velocity)
    return join(position, velocity), (position >= goal) & (velocity >= 0)


def mountain_car(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    MountainCar-v0.

    :param state: ``[B, 2]``: position and velocity (per step)
    :param action: int64 ``[B, 1]``: 0 pushes to the left, 1 not at all, 2 to the right
    :return: next state ``[B, 2]``; terminated, bool ``[B]``: position 0.5 is reached
    """
    return _drive(state, (action[:, 0].to(state.dtype) - 1) * 0.001, goal=0.5)


def mountain_car_continuous(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    MountainCarContinuous-v0.

    :param state: ``[B, 2]``: position and velocity (per step)
    :param action: float32 ``[B, 1]``: the force, -1 to 1
    :return: next state ``[B, 2]``; terminated, bool ``[B]``: position 0.45 is reached
    """
    return _drive(state, action[:, 0].to(state.dtype).clamp(-1, 1) * 0.0015, goal=0.45)


def pendulum(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Pendulum-v1; it never terminates.

    :param state: ``[B, 3]``: cosine and sine of the angle (0 is upright), angular velocity (rad/s)
    :param action: float32 ``[B, 1]``: torque, -2 to 2 N m
    :return: next state ``[B, 3]``; terminated, bool ``[B]``, all false
    """
    step, gravity = 0.05, 10.0
    cosine, sine, spin = columns(state)
    torque = action[:, 0].to(state.dtype).clamp(-2, 2)
    spin = (spin + (1.5 * gravity * sine + 3 * torque) * step).clamp(-8, 8)
    angle = th.atan2(sine, cosine) + spin * step
    return join(angle.cos(), angle.sin(), spin), th.zeros_like(spin, dtype=th.bool)
