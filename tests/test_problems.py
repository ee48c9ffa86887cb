"""data.py: every multi-objective problem against its published formula, and looking problems up.

The formulas here are written down from the publications as scalar loops with 1-based indices, one
point at a time, and share nothing with data.py.
"""
import itertools
import math
from math import cos, exp, pi, sin, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
from common import UserError

RE = [name for name in data.PROBLEMS if name.startswith("re")]
DISCRETE = ["re22", "re23", "re25", "re35", "re36"]
SMOOTH = [name for name in data.PROBLEMS if name not in DISCRETE]
WITH_FRONT = [name for name in data.PROBLEMS if data.get_problem(name).front is not None]


# -- formulas: x[1] ... x[n] -> [f1 ... fm] ------------------------------------------------------


def f_suite(number):
    def pareto_set(x1, j, n):
        """Where x_j lies on the Pareto set, in the interval that the publication uses."""
        wave, fold = 4 * pi * x1 + j * pi / n, .3 * x1 ** 2 * cos(12 * pi * x1 + 4 * j * pi / n)
        return {1: (2 * x1 - 1) ** 2,
                2: x1 ** (.5 * (1 + 3 * (j - 2) / (n - 2))),
                3: .5 * (sin(wave) + 1),
                4: .8 * x1 * (sin(wave) if j % 2 == 0 else cos(wave)),
                5: .8 * x1 * (sin(wave) if j % 2 == 0 else cos(wave / 3)),
                6: (fold + .6 * x1) * (sin if j % 2 == 0 else cos)(6 * pi * x1 + j * pi / n)
                }[number]

    def f(x):
        n = len(x) - 1
        sums, counts = [0, 0], [0, 0]  # of even and of odd j
        for j in range(2, n + 1):
            xj = x[j] if number <= 3 else 2 * x[j] - 1
            y = (xj - pareto_set(x[1], j, n)) ** 2
            sums[j % 2] += y ** 2 if number == 6 and j % 2 == 0 else y
            counts[j % 2] += 1
        g = 1 + sums[0] / counts[0]
        root = sqrt(x[1]) if number == 3 else sqrt(x[1] / g)  # F3 divides by nothing under it
        return [x[1] * (1 + sums[1] / counts[1]), g * (1 - root)]

    f.pareto_set = pareto_set
    return f


def zdt(number):
    def f(x):
        n = len(x) - 1
        total = sum(x[i] for i in range(2, n + 1))
        f1, g = x[1], 1 + 9 * total / (n - 1)
        if number == 4:
            g = 1 + 10 * (n - 1)
            for i in range(2, n + 1):
                g += x[i] ** 2 - 10 * cos(4 * pi * x[i])
        if number == 6:
            f1 = 1 - exp(-4 * x[1]) * sin(6 * pi * x[1]) ** 6
            g = 1 + 9 * (total / (n - 1)) ** .25
        h = {1: 1 - sqrt(f1 / g), 2: 1 - (f1 / g) ** 2, 4: 1 - sqrt(f1 / g), 6: 1 - (f1 / g) ** 2,
             3: 1 - sqrt(f1 / g) - f1 / g * sin(10 * pi * f1)}[number]
        return [f1, g * h]
    return f


def dtlz(number, m):
    def f(x):
        n = len(x) - 1
        k = n - m + 1
        g = 0
        for i in range(m, n + 1):
            g += (x[i] - .5) ** 2 - (cos(20 * pi * (x[i] - .5)) if number == 1 else 0)
        if number == 1:
            g = 100 * (k + g)
        values = []
        for i in range(1, m + 1):
            value = .5 * (1 + g) if number == 1 else 1 + g
            for j in range(1, m - i + 1):
                value *= x[j] if number == 1 else cos(x[j] * pi / 2)
            if i > 1:
                j = m - i + 1
                value *= 1 - x[j] if number == 1 else sin(x[j] * pi / 2)
            values.append(value)
        return values
    return f


def vlmop1(x):
    return [x[1] ** 2, (x[1] - 2) ** 2]


def vlmop2(x):
    n = len(x) - 1
    near, far = 0, 0
    for i in range(1, n + 1):
        near += (x[i] - 1 / sqrt(n)) ** 2
        far += (x[i] + 1 / sqrt(n)) ** 2
    return [1 - exp(-near), 1 - exp(-far)]


def vlmop3(x):
    r = x[1] ** 2 + x[2] ** 2
    return [.5 * r + sin(r),
            (3 * x[1] - 2 * x[2] + 4) ** 2 / 8 + (x[1] - x[2] + 1) ** 2 / 27 + 15,
            1 / (r + 1) - 1.1 * exp(-r)]


def violated(*constraints):
    """The RE suite writes constraints as g >= 0 and adds up what is missing."""
    return sum(-g for g in constraints if g < 0)


def re21(x):
    force, length, young = 10, 200, 2e5
    return [length * (2 * x[1] + sqrt(2) * x[2] + sqrt(x[3]) + x[4]),
            force * length / young * (2 / x[1] + 2 * sqrt(2) / x[2] - 2 * sqrt(2) / x[3]
                                      + 2 / x[4])]


# The bars as Amir and Hasegawa (1989) list them; the suite's Python file splits "3.10" into 3 and
# 10 by a misprint, its C file does not.
BARS = """0.20 0.31 0.40 0.44 0.60 0.62 0.79 0.80 0.88 0.93 1.0 1.20 1.24 1.32 1.40 1.55 1.58 1.60
    1.76 1.80 1.86 2.0 2.17 2.20 2.37 2.40 2.48 2.60 2.64 2.79 2.80 3.0 3.08 3 10 3.16 3.41 3.52
    3.60 3.72 3.95 3.96 4.0 4.03 4.20 4.34 4.40 4.65 4.74 4.80 4.84 5.0 5.28 5.40 5.53 5.72 6.0
    6.16 6.32 6.60 7.11 7.20 7.80 7.90 8.0 8.40 8.69 9.0 9.48 10.27 11.0 11.06 11.85 12.0 13.0
    14.0 15.0"""
WIRES = """0.009 0.0095 0.0104 0.0118 0.0128 0.0132 0.014 0.015 0.0162 0.0173 0.018 0.02 0.023
    0.025 0.028 0.032 0.035 0.041 0.047 0.054 0.063 0.072 0.08 0.092 0.105 0.12 0.135 0.148 0.162
    0.177 0.192 0.207 0.225 0.244 0.263 0.283 0.307 0.331 0.362 0.394 0.4375 0.5"""


def nearest(value, table):
    return min((float(word) for word in table.split()), key=lambda entry: abs(entry - value))


def re22(x):
    steel, x2, x3 = nearest(x[1], BARS), max(x[2], 1e-9), x[3]  # x2 = 0 would divide by zero
    return [29.4 * steel + .6 * x2 * x3,
            violated(steel * x3 - 7.735 * steel ** 2 / x2 - 180, 4 - x3 / x2)]


def re23(x):
    shell, head = .0625 * round(x[1]), .0625 * round(x[2])
    return [.6224 * shell * x[3] * x[4] + 1.7781 * head * x[3] ** 2
            + 3.1661 * shell ** 2 * x[4] + 19.84 * shell ** 2 * x[3],
            violated(-.0193 * x[3] + shell, -.00954 * x[3] + head,
                     pi * x[3] ** 2 * x[4] + 4 / 3 * pi * x[3] ** 3 - 1296000)]


def re24(x):
    young = 700000
    sigma_b, tau = 4500 / (x[1] * x[2]), 1800 / x[2]
    delta, sigma_k = 562000 / (young * x[1] * x[2] ** 2), young * x[1] ** 2 / 100
    return [x[1] + 120 * x[2], violated(1 - sigma_b / 700, 1 - tau / 450, 1 - delta / 1.5,
                                        1 - sigma_b / sigma_k)]


def re25(x):
    coils, x2, wire = round(x[1]), x[2], nearest(x[3], WIRES)
    ratio = x2 / wire
    wahl = (4 * ratio - 1) / (4 * ratio - 4) + .615 * wire / x2
    f_max, strength, modulus, l_max, preload, s_pm, s_w = 1000, 189000, 11.5e6, 14, 300, 6, 1.25
    k = modulus * wire ** 4 / (8 * coils * x2 ** 3)
    l_f, s_p = f_max / k + 1.05 * (coils + 2) * wire, preload / k
    return [pi ** 2 * x2 * wire ** 2 * (coils + 2) / 4,
            violated(strength - 8 * wahl * f_max * x2 / (pi * wire ** 3), l_max - l_f, ratio - 3,
                     s_pm - s_p, s_w - (f_max - preload) / k)]
    # one more, -s_p - (f_max - preload) / k - 1.05 (x1 + 2) x3 + l_f >= 0, is always exactly 0


def re31(x):
    f1 = x[1] * sqrt(16 + x[3] ** 2) + x[2] * sqrt(1 + x[3] ** 2)
    f2 = 20 * sqrt(16 + x[3] ** 2) / (x[1] * x[3])
    return [f1, f2, violated(.1 - f1, 1e5 - f2, 1e5 - 80 * sqrt(1 + x[3] ** 2) / (x[3] * x[2]))]


def re32(x):
    p, arm, young, shear = 6000, 14, 30e6, 12e6
    m = p * (arm + x[2] / 2)
    r = sqrt(x[2] ** 2 / 4 + ((x[1] + x[3]) / 2) ** 2)
    j = 2 * (sqrt(2) * x[1] * x[2] * (x[2] ** 2 / 12 + ((x[1] + x[3]) / 2) ** 2))
    first, second = p / (sqrt(2) * x[1] * x[2]), m * r / j
    tau = sqrt(first ** 2 + 2 * first * second * x[2] / (2 * r) + second ** 2)
    sigma = 6 * p * arm / (x[4] * x[3] ** 2)
    p_c = 4.013 * young * sqrt(x[3] ** 2 * x[4] ** 6 / 36) / arm ** 2 \
        * (1 - x[3] / (2 * arm) * sqrt(young / (4 * shear)))
    return [1.10471 * x[1] ** 2 * x[2] + .04811 * x[3] * x[4] * (14 + x[2]),
            4 * p * arm ** 3 / (young * x[4] * x[3] ** 3),
            violated(13600 - tau, 30000 - sigma, x[4] - x[1], p_c - p)]


def re33(x):
    squares, cubes = x[2] ** 2 - x[1] ** 2, x[2] ** 3 - x[1] ** 3
    return [4.9e-5 * squares * (x[4] - 1), 9.82e6 * squares / (x[3] * x[4] * cubes),
            violated((x[2] - x[1]) - 20, .4 - x[3] / (3.14 * squares),
                     1 - 2.22e-3 * x[3] * cubes / squares ** 2,
                     2.66e-2 * x[3] * x[4] * cubes / squares - 900)]


def polynomial(x, text):
    """Σ coefficient · product of variables; `text` holds terms such as "-0.0073*12" (x1 x2)."""
    total = 0
    for term in text.split():
        coefficient, _, variables = term.partition("*")
        value = float(coefficient)
        for i in variables:
            value *= x[int(i)]
        total += value
    return total


def re34(x):
    return [polynomial(x, "1640.2823 2.3573285*1 2.3220035*2 4.5688768*3 7.7213633*4 4.4559504*5"),
            polynomial(x, "6.5856 1.15*1 -1.0427*2 .9738*3 .8364*4 -.3695*14 .0861*15 .3628*24 "
                          "-.1106*11 -.3437*33 .1764*44"),
            polynomial(x, "-.0551 .0181*1 .1024*2 .0421*3 -.0073*12 .024*23 -.0118*24 -.0204*34 "
                          "-.008*35 -.0241*22 .0109*44")]


def re35(x):
    x1, x2, x3, x4, x5, x6, x7 = x[1], x[2], round(x[3]), x[4], x[5], x[6], x[7]
    f1 = .7854 * x1 * x2 ** 2 * (10 * x3 ** 2 / 3 + 14.933 * x3 - 43.0934) \
        - 1.508 * x1 * (x6 ** 2 + x7 ** 2) + 7.477 * (x6 ** 3 + x7 ** 3) \
        + .7854 * (x4 * x6 ** 2 + x5 * x7 ** 2)
    f2 = sqrt((745 * x4 / (x2 * x3)) ** 2 + 1.69e7) / (.1 * x6 ** 3)
    other = sqrt((745 * x5 / (x2 * x3)) ** 2 + 1.575e8) / (.1 * x7 ** 3)
    return [f1, f2, violated(
        1 / 27 - 1 / (x1 * x2 ** 2 * x3), 1 / 397.5 - 1 / (x1 * x2 ** 2 * x3 ** 2),
        1 / 1.93 - x4 ** 3 / (x2 * x3 * x6 ** 4), 1 / 1.93 - x5 ** 3 / (x2 * x3 * x7 ** 4),
        40 - x2 * x3, 12 - x1 / x2, x1 / x2 - 5, x4 - 1.5 * x6 - 1.9, x5 - 1.1 * x7 - 1.9,
        1300 - f2, 1100 - other)]


def re36(x):
    teeth = [None] + [round(v) for v in x[1:]]
    f1 = abs(6.931 - teeth[3] / teeth[1] * (teeth[4] / teeth[2]))
    return [f1, max(teeth[1:]), violated(.5 - f1 / 6.931)]


def re37(x):  # x1 = alpha, x2 = delta HA, x3 = delta OA, x4 = OPTT
    return [polynomial(x, ".692 .477*1 -.687*2 -.080*3 -.0650*4 -.167*11 -.0129*21 .0796*22 "
                          "-.0634*31 -.0257*32 .0877*33 -.0521*41 .00156*42 .00198*43 .0184*44"),
            polynomial(x, ".153 -.322*1 .396*2 .424*3 .0226*4 .175*11 .0185*21 -.0701*22 -.251*31 "
                          ".179*32 .0150*33 .0134*41 .0296*42 .0752*43 .0192*44"),
            polynomial(x, ".370 -.205*1 .0307*2 .108*3 1.019*4 -.135*11 .0141*21 .0998*22 .208*31 "
                          "-.0301*32 -.226*33 .353*41 -.0497*43 -.423*44 .202*211 -.281*311 "
                          "-.342*221 -.245*223 .281*332 -.184*441 -.281*213")]


def re41(x):
    f1 = polynomial(x, "1.98 4.9*1 6.67*2 6.98*3 4.01*4 1.78*5 .00001*6 2.73*7")
    force = polynomial(x, "4.72 -.5*4 -.19*23")
    v_mbp = polynomial(x, "10.58 -.674*12 -.67275*2")
    v_fd = polynomial(x, "16.45 -.489*37 -.843*56")
    return [f1, force, (v_mbp + v_fd) / 2, violated(
        1 - polynomial(x, "1.16 -.3717*24 -.0092928*3"),
        .32 - polynomial(x, ".261 -.0159*12 -.06486*1 -.019*27 .0144*35 .0154464*6"),
        .32 - polynomial(x, ".214 .00817*5 -.045195*1 -.0135168*1 .03099*26 -.018*27 .007176*3 "
                            ".023232*3 -.00364*56 -.018*22"),
        .32 - polynomial(x, ".74 -.61*2 -.031296*3 -.031872*7 .227*22"),
        32 - polynomial(x, "28.98 3.818*3 -4.2*12 1.27296*6 -2.68065*7"),
        32 - polynomial(x, "33.86 2.95*3 -5.057*12 -3.795*2 -3.4431*7 1.45728"),
        32 - polynomial(x, "46.36 -9.9*2 -4.4505*1"), 4 - force, 9.9 - v_mbp, 15.7 - v_fd)]


def re42(x):
    length, beam, depth, draft, speed, c_b = x[1:]
    displacement = 1.025 * length * beam * draft * c_b
    froude = .5144 * speed / sqrt(9.8065 * length)
    a = 4977.06 * c_b ** 2 - 8105.61 * c_b + 4456.51
    b = -10847.2 * c_b ** 2 + 12817 * c_b - 6960.32
    power = displacement ** (2 / 3) * speed ** 3 / (a + b * froude)
    steel = .034 * length ** 1.7 * beam ** .7 * depth ** .4 * c_b ** .5
    outfit = length ** .8 * beam ** .6 * depth ** .3 * c_b ** .1
    machinery = .17 * power ** .9
    light_ship = steel + outfit + machinery
    ship_cost = 1.3 * (2000 * steel ** .85 + 3500 * outfit + 2400 * power ** .8)
    capital_costs = .2 * ship_cost
    dwt = displacement - light_ship
    running_costs = 40000 * dwt ** .3
    round_trip = 5000
    sea_days = round_trip / 24 * speed  # as the suite's code has it
    daily_consumption = .19 * power * 24 / 1000 + .2
    fuel_cost = 1.05 * daily_consumption * sea_days * 100
    port_cost = 6.3 * dwt ** .8
    fuel_carried = daily_consumption * (sea_days + 5)
    cargo = dwt - fuel_carried - 2 * dwt ** .5
    port_days = 2 * (cargo / 8000 + .5)
    trips = 350 / (sea_days + port_days)
    annual_costs = capital_costs + running_costs + (fuel_cost + port_cost) * trips
    k_b, bm_t, k_g = .53 * draft, (.085 * c_b - .002) * beam ** 2 / (draft * c_b), 1 + .52 * depth
    return [annual_costs / (cargo * trips), light_ship, -cargo * trips, violated(
        length / beam - 6, 15 - length / depth, 19 - length / draft, .45 * dwt ** .31 - draft,
        .7 * depth + .7 - draft, 500000 - dwt, dwt - 3000, .32 - froude,
        k_b + bm_t - k_g - .07 * beam)]


def re61(x):
    inverse = 1 / (x[1] * x[2])
    return [106780.37 * (x[2] + x[3]) + 61704.67, 3000 * x[1],
            305700 * 2289 * x[2] / (.06 * 2289) ** .65,
            250 * 2289 * exp(-39.75 * x[2] + 9.9 * x[3] + 2.74),
            25 * (1.39 * inverse + 4940 * x[3] - 80), violated(
                1 - (.00139 * inverse + 4.94 * x[3] - .08),
                1 - (.000306 * inverse + 1.082 * x[3] - .0986),
                50000 - (12.307 * inverse + 49408.24 * x[3] + 4051.02),
                16000 - (2.098 * inverse + 8046.33 * x[3] - 696.71),
                10000 - (2.138 * inverse + 7883.39 * x[3] - 705.04),
                2000 - (.417 * x[1] * x[2] + 1721.26 * x[3] - 136.54),
                550 - (.164 * inverse + 631.13 * x[3] - 54.48))]


def re91(x, normal=(0, 0, 0, 0)):
    """`normal`: the four standard normal numbers behind x8 ... x11, here variables a, b, c, d."""
    x = [*x, *(mean + deviation * z for mean, deviation, z in
               zip((.345, .192, 0, 0), (.006, .006, 10, 10), normal, strict=True))]
    x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11 = x[1:]
    ribs = [28.98 + 3.818 * x3 - 4.2 * x1 * x2 + .0207 * x5 * x10 + 6.63 * x6 * x9
            - 7.77 * x7 * x8 + .32 * x9 * x10,
            33.86 + 2.95 * x3 + .1792 * x10 - 5.057 * x1 * x2 - 11 * x2 * x8 - .0215 * x5 * x10
            - 9.98 * x7 * x8 + 22 * x8 * x9,
            46.36 - 9.9 * x2 - 12.9 * x1 * x8 + .1107 * x3 * x10]
    f = [1.98 + 4.9 * x1 + 6.67 * x2 + 6.98 * x3 + 4.01 * x4 + 1.75 * x5 + .00001 * x6 + 2.73 * x7,
         1.16 - .3717 * x2 * x4 - .00931 * x2 * x10 - .484 * x3 * x9 + .01343 * x6 * x10,
         (.261 - .0159 * x1 * x2 - .188 * x1 * x8 - .019 * x2 * x7 + .0144 * x3 * x5
          + .0008757 * x5 * x10 + .08045 * x6 * x9 + .00139 * x8 * x11 + .00001575 * x10 * x11)
         / .32,
         (.214 + .00817 * x5 - .131 * x1 * x8 - .0704 * x1 * x9 + .03099 * x2 * x6
          - .018 * x2 * x7 + .0208 * x3 * x8 + .121 * x3 * x9 - .00364 * x5 * x6
          + .0007715 * x5 * x10 - .0005354 * x6 * x10 + .00121 * x8 * x11 + .00184 * x9 * x10
          - .018 * x2 ** 2) / .32,
         (.74 - .61 * x2 - .163 * x3 * x8 + .001232 * x3 * x10 - .166 * x7 * x9 + .227 * x2 ** 2)
         / .32,
         sum(ribs) / 3 / 32,
         (4.72 - .5 * x4 - .19 * x2 * x3 - .0122 * x4 * x10 + .009325 * x6 * x10
          + .000191 * x11 ** 2) / 4,
         (10.58 - .674 * x1 * x2 - 1.95 * x2 * x8 + .02054 * x3 * x10 - .0198 * x4 * x10
          + .028 * x6 * x10) / 9.9,
         (16.45 - .489 * x3 * x7 - .843 * x5 * x6 + .0432 * x9 * x10 - .0556 * x9 * x11
          - .000786 * x11 ** 2) / 15.7]
    return [f[0], *(max(0, v) for v in f[1:])]


# The multitask suite: g, front, bounds of z, its length, s, name of the matrix.
TASKS = {
    "cihs1": ("sphere", "circle", -100, 100, [0] * 49, None),
    "cihs2": ("mean", "concave", -100, 100, [0] * 49, None),
    "cims1": ("rosenbrock", "concave", -5, 5, [0] * 9, None),
    "cims2": ("mean", "circle", -5, 5, [1] * 9, "cims2"),
    "cils1": ("rastrigin", "circle", -2, 2, [0] * 49, None),
    "cils2": ("ackley", "convex", -1, 1, [0] * 49, None),
    "pihs1": ("sphere", "convex", -100, 100, [0] * 49, None),
    "pihs2": ("rastrigin", "convex", -100, 100, [0] * 39 + [.1] * 10, None),
    "pims1": ("sphere", "circle", 0, 1, [0] * 24 + [.2] * 25, "pims1"),
    "pims2": ("rastrigin", "concave", 0, 1, [0] * 49, "pims2"),
    "pils1": ("griewank", "circle", -50, 50, [0] * 49, None),
    "pils2": ("ackley", "circle", -100, 100, [0] * 24 + [20] * 25, None),
    "nihs1": ("rosenbrock", "circle", -80, 80, [0] * 49, None),
    "nihs2": ("sphere", "convex", -80, 80, [0] * 49, None),
    "nims1": ("rosenbrock", "sphere", -20, 20, [0] * 18, None),
    "nims2": ("sphere", "concave, two", -20, 20, [0] * 18, "nims2"),
    "nils1": ("griewank", "sphere", -50, 50, [20] * 23, None),
    "nils2": ("ackley", "concave, two", -100, 100, [0] * 48, None)}


def distance(kind, z):
    """g of the suite; z[1] ... z[n]."""
    n = len(z) - 1
    total, product = 0, 1
    if kind == "rosenbrock":
        for i in range(1, n):
            total += 100 * (z[i] ** 2 - z[i + 1]) ** 2 + (1 - z[i]) ** 2
        return total
    if kind == "ackley":
        waves = 0
        for i in range(1, n + 1):
            total += z[i] ** 2
            waves += cos(2 * pi * z[i])
        return -20 * exp(-.2 * sqrt(total / n)) - exp(waves / n) + 20 + exp(1)
    for i in range(1, n + 1):
        total += {"sphere": z[i] ** 2, "mean": 9 / n * abs(z[i]), "griewank": z[i] ** 2 / 4000,
                  "rastrigin": z[i] ** 2 - 10 * cos(2 * pi * z[i]) + 10}[kind]
        product *= cos(z[i] / sqrt(i))
    return total + 1 - product if kind == "griewank" else total


def multitask(name, matrix=None):
    kind, front, _, _, s, _ = TASKS[name]
    first = 3 if front in ("sphere", "concave, two") else 2

    def f(x):
        z = [xi - si for xi, si in zip(x[first:], s, strict=True)]
        if matrix is not None:
            z = [sum(matrix[i][j] * z[j] for j in range(len(z))) for i in range(len(z))]
        q, a = 1 + distance(kind, [None, *z]), x[1] * pi / 2
        if front == "circle":
            return [q * cos(a), q * sin(a)]
        if front == "sphere":
            b = x[2] * pi / 2
            return [q * cos(a) * cos(b), q * cos(a) * sin(b), q * sin(a)]
        f1 = (x[1] + x[2]) / 2 if first == 3 else x[1]
        return [f1, q * (1 - (sqrt(f1 / q) if front == "convex" else (f1 / q) ** 2))]
    return f


FORMULAS = {
    **{f"f{k}": f_suite(k) for k in range(1, 7)}, **{f"zdt{k}": zdt(k) for k in (1, 2, 3, 4, 6)},
    **{f"dtlz{k}-{m}": dtlz(k, m) for k in (1, 2) for m in (2, 3, 4, 5)},
    "vlmop1": vlmop1, "vlmop2": vlmop2, "vlmop3": vlmop3,
    "re21": re21, "re22": re22, "re23": re23, "re24": re24, "re25": re25, "re31": re31,
    "re32": re32, "re33": re33, "re34": re34, "re35": re35, "re36": re36, "re37": re37,
    "re41": re41, "re42": re42, "re61": re61, "re91": re91}
SIZES = {  # name: (variables, objectives)
    **{f"f{k}": (6, 2) for k in range(1, 7)}, "zdt1": (30, 2), "zdt2": (30, 2), "zdt3": (30, 2),
    "zdt4": (10, 2), "zdt6": (10, 2),
    **{f"dtlz1-{m}": (m + 4, m) for m in range(2, 6)},
    **{f"dtlz2-{m}": (m + 9, m) for m in range(2, 6)},
    "vlmop1": (1, 2), "vlmop2": (6, 2), "vlmop3": (2, 3), "re21": (4, 2), "re22": (3, 2),
    "re23": (4, 2), "re24": (2, 2), "re25": (3, 2), "re31": (3, 3), "re32": (4, 3), "re33": (4, 3),
    "re34": (5, 3), "re35": (7, 3), "re36": (4, 3), "re37": (4, 3), "re41": (7, 4), "re42": (6, 4),
    "re61": (3, 6), "re91": (7, 9), "cims1": (10, 2), "cims2": (10, 2), "nims1": (20, 3),
    "nims2": (20, 2), "nils1": (25, 3),
    **{name: (50, 2) for name in data.MTMO if name not in (
        "cims1", "cims2", "nims1", "nims2", "nils1")}}
BOUNDS = {
    **{f"f{k}": ([0] * 6, [1] * 6) for k in range(1, 7)},
    **{f"zdt{k}": ([0] * SIZES[f"zdt{k}"][0], [1] * SIZES[f"zdt{k}"][0]) for k in (1, 2, 3, 6)},
    "zdt4": ([0] + [-5] * 9, [1] + [5] * 9),
    **{name: ([0] * n, [1] * n) for name, (n, _) in SIZES.items() if name.startswith("dtlz")},
    "vlmop1": ([-2], [4]), "vlmop2": ([-2] * 6, [2] * 6), "vlmop3": ([-3, -3], [3, 3]),
    "re21": ([1, sqrt(2), sqrt(2), 1], [3, 3, 3, 3]), "re22": ([.2, 0, 0], [15, 20, 40]),
    "re23": ([1, 1, 10, 10], [100, 100, 200, 240]), "re24": ([.5, .5], [4, 50]),
    "re25": ([1, .6, .09], [70, 3, .5]), "re31": ([1e-5, 1e-5, 1], [100, 100, 3]),
    "re32": ([.125, .1, .1, .125], [5, 10, 10, 5]),
    "re33": ([55, 75, 1000, 11], [80, 110, 3000, 20]), "re34": ([1] * 5, [3] * 5),
    "re35": ([2.6, .7, 17, 7.3, 7.3, 2.9, 5], [3.6, .8, 28, 8.3, 8.3, 3.9, 5.5]),
    "re36": ([12] * 4, [60] * 4), "re37": ([0] * 4, [1] * 4),
    "re41": ([.5, .45, .5, .5, .875, .4, .4], [1.5, 1.35, 1.5, 1.5, 2.625, 1.2, 1.2]),
    "re42": ([150, 20, 13, 10, 14, .63], [274.32, 32.31, 25, 11.71, 18, .75]),
    "re61": ([.01] * 3, [.45, .1, .1]),
    "re91": ([.5, .45, .5, .5, .875, .4, .4], [1.5, 1.35, 1.5, 1.5, 2.625, 1.2, 1.2])}
for _name, (_, _front, _low, _high, _s, _) in TASKS.items():
    _first = 2 if _front in ("sphere", "concave, two") else 1
    BOUNDS[_name] = ([0] * _first + [_low] * len(_s), [1] * _first + [_high] * len(_s))


def points(problem, seed=0, count=8, corners=8):
    """Random points inside the bounds, some corners, both extreme ones included. float64."""
    rng = np.random.default_rng([seed, problem.n_var])
    unit = np.concatenate([rng.random((count, problem.n_var)),
                           rng.integers(0, 2, (corners, problem.n_var)),
                           np.zeros((1, problem.n_var)), np.ones((1, problem.n_var))])
    return problem.scale(torch.from_numpy(unit))


def optimum(name):
    """Variables behind the position variables of a multitask problem where its g is 0."""
    kind, _, _, _, s, _ = TASKS[name]
    return torch.tensor(s, dtype=torch.float64) + (1 if kind == "rosenbrock" else 0)


def assert_equal_to_formula(f, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    scale = expected.abs().amax(0)
    assert f.shape == expected.shape and f.dtype == torch.float64
    assert ((f - expected).abs() <= 1e-10 * expected.abs() + 1e-12 * scale).all(), f - expected


# -- values --------------------------------------------------------------------------------------


def test_every_problem_has_its_formula_here():
    assert sorted([*FORMULAS, *TASKS]) == data.PROBLEMS == sorted(SIZES) == sorted(BOUNDS)


@pytest.mark.parametrize("name", FORMULAS)
def test_values_equal_the_published_formula(name):
    problem = data.get_problem(name)
    x = points(problem, count=400, corners=40) if name in RE else points(problem)
    assert_equal_to_formula(problem(x), [FORMULAS[name]([None, *row]) for row in x.tolist()])


@pytest.mark.parametrize("name", TASKS)
def test_values_of_multitask_problems_equal_the_published_formula(name, tmp_path):
    file, size, matrix = TASKS[name][-1], len(TASKS[name][4]), None
    if file:
        matrix = np.random.default_rng(5).normal(size=(size, size))
        (tmp_path / "mtmo").mkdir()
        np.savetxt(tmp_path / "mtmo" / f"{file}.txt", matrix, fmt="%.17g")
    problem = data.get_problem(name, tmp_path)
    x = points(problem)
    f = multitask(name, None if matrix is None else matrix.tolist())
    assert_equal_to_formula(problem(x), [f([None, *row]) for row in x.tolist()])


@pytest.mark.parametrize("name, x, expected", [
    ("f1", [.25, .25, .25, .25, .25, .25], [.25, .5]),
    # sin(π + jπ/6) = -√¾, -1, -√¾, -½, 0 for j = 2 ... 6, so y² = a, 0, a, 1/16, ¼, a = (½ - √¾/2)²
    ("f3", [.25, 0, 0, 0, 0, 0], [.25 * (1 + 1 / 32),
                                  .5 * (1 + (2 * (.5 - sqrt(.75) / 2) ** 2 + .25) / 3)]),
    ("f2", [1, 1, 1, 1, 1, 1], [1, 0]), ("f4", [0, .5, .5, .5, .5, .5], [0, 1]),
    ("f4", [0, 1, .5, 1, .5, 1], [0, 2]), ("f6", [0, 1, .5, 1, .5, .5], [0, 5 / 3]),
    ("zdt1", [.25] + [0] * 29, [.25, .5]), ("zdt1", [1] * 30, [1, 10 - sqrt(10)]),
    ("zdt2", [.5] + [0] * 29, [.5, .75]), ("zdt2", [1] * 30, [1, 9.9]),
    ("zdt3", [.05] + [0] * 29, [.05, 1 - sqrt(.05) - .05]),
    ("zdt4", [.25] + [0] * 9, [.25, .5]), ("zdt4", [1] + [5] * 9, [1, 226 - sqrt(226)]),
    ("zdt6", [0] * 10, [1, 0]), ("zdt6", [1 / 6] + [1] * 9, [1, 9.9]),
    ("dtlz1-3", [.5, .5] + [.5] * 5, [.125, .125, .25]), ("dtlz1-3", [1, 1] + [.5] * 5, [.5, 0, 0]),
    ("dtlz1-3", [0, 1] + [.5] * 5, [0, 0, .5]), ("dtlz1-2", [1] + [1] * 5, [63, 0]),
    ("dtlz2-3", [.5, .5] + [.5] * 10, [.5, .5, sqrt(.5)]),
    ("dtlz2-3", [1 / 3, 0] + [.5] * 10, [sqrt(.75), 0, .5]),
    ("dtlz2-2", [1 / 3] + [1] * 10, [3.5 * sqrt(.75), 1.75]),
    ("vlmop1", [-2], [4, 16]), ("vlmop2", [1 / sqrt(6)] * 6, [0, 1 - exp(-4)]),
    ("vlmop3", [0, 0], [0, 17 + 1 / 27, -.1]), ("vlmop3", [-2, -1], [2.5 + sin(5), 15, 1 / 6
                                                                     - 1.1 * exp(-5)]),
    ("re21", [1, sqrt(2), sqrt(2), 1], [1000 + 200 * 2 ** .25, .04]),
    ("re21", [2, 2, 2.25, 2], [200 * (6 + 2 * sqrt(2) + 1.5), .01 * (2 + sqrt(2) / 9)]),
    ("re22", [.2, 20, 0], [5.88, 180.01547]), ("re22", [3.095, 10, 40], [330.552, 64.1377304]),
    ("re22", [9.8, 10, 40], [534, 0]),  # the area 10 of the suite's "3, 10"
    ("re23", [1, 1, 10, 10], [15.90180078125, 1296000 - 7000 * pi / 3 + .1634]),
    ("re24", [.5, .5], [60.5, 44.281904761904762]), ("re24", [4, 50], [6004, 0]),
    ("re25", [1, 1, .5], [.75 * pi ** 2 * .25, 1]),
    ("re31", [1e-5, 1e-5, 1], [1e-5 * (sqrt(17) + sqrt(2)), 8246211.2512353, 19359919.7502196]),
    ("re31", [100, 100, 3], [500 + 100 * sqrt(10), 1 / 3, 499.9 + 100 * sqrt(10)]),
    ("re33", [55, 75, 1000, 11], [1.274, 9.82e6 * 2600 / (11000 * 255500), 0]),
    ("re34", [1] * 5, [1661.7078225, 8.3046, .0708]),
    ("re36", [12] * 4, [5.931, 12, 5.931 / 6.931 - .5]),
    ("re36", [30, 15.4, 60, 45], [.931, 60, 0]),
    ("re37", [0] * 4, [.692, .153, .37]), ("re37", [.92, 0, 0, 0], [.9894912, .00488, .067136]),
    ("re37", [1] * 4, [.20514, .8774, .2838]),
    ("re61", [.45, .1, .1], [83060.744, 1350, 30570 * 2289 / 137.34 ** .65,
                             572250 * exp(-.245), 25 * (1.39 / .045 + 414), 0]),
    ("cihs1", [0] + [1] * 49, [50, 0]), ("cihs2", [1] + [-1] * 49, [1, 10 * .99]),
    ("cims1", [.5] + [1] * 9, [.5, .75]), ("cils1", [1] + [.5] * 49, [0, 1 + 49 * 20.25]),
    ("cils2", [.25] + [0] * 49, [.25, .5]), ("nils1", [1, 0] + [20] * 23, [0, 0, 1]),
    ("nils2", [.2, .4] + [0] * 48, [.3, .91])])
def test_values_worked_out_by_hand(name, x, expected):
    f = data.get_problem(name)(torch.tensor(x, dtype=torch.float64))
    assert f.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name, bound, x, objectives", [
    ("re21", "ideal", "0000", [0]), ("re21", "nadir", "0000", [1]),
    ("re21", "ideal", "1101", [1]), ("re21", "nadir", "1101", [0]),
    ("re22", "ideal", "010", [0]), ("re22", "nadir", "010", [1]),
    ("re23", "ideal", "0000", [0]), ("re23", "nadir", "0000", [1]),
    ("re24", "ideal", "00", [0]), ("re24", "nadir", "00", [1]), ("re24", "ideal", "11", [1]),
    ("re25", "ideal", "000", [0]),
    ("re31", "ideal", "000", [0]), ("re31", "nadir", "000", [1, 2]),
    ("re31", "ideal", "101", [1]),
    ("re32", "ideal", "0000", [0]), ("re32", "nadir", "0000", [1, 2]),
    ("re32", "ideal", "0011", [1]),
    ("re33", "ideal", "1001", [0]), ("re33", "ideal", "1111", [1]),
    ("re33", "nadir", "1111", [0]),
    ("re34", "ideal", "00000", [0]), ("re34", "ideal", "01100", [1]),
    ("re34", "ideal", "00111", [2]),
    ("re35", "ideal", "0000000", [0]), ("re35", "nadir", "0000000", [1, 2]),
    ("re35", "ideal", "0110010", [1]),
    ("re36", "ideal", "0000", [1]), ("re36", "nadir", "0000", [0, 2]),
    ("re41", "ideal", "0000000", [0]), ("re41", "nadir", "0000000", [1, 2]),
    ("re41", "ideal", "1111111", [1, 2]),
    ("re42", "ideal", "110100", [0, 2]), ("re42", "nadir", "110100", [1, 3]),
    ("re42", "ideal", "000000", [1]), ("re42", "nadir", "000000", [0, 2]),
    ("re61", "ideal", "000", [0, 1, 2]), ("re61", "nadir", "011", [0, 2]),
    ("re61", "nadir", "101", [1]), ("re61", "ideal", "010", [3]),
    ("re61", "ideal", "110", [4])])
def test_published_ideal_and_nadir_points_lie_at_these_corners(name, bound, x, objectives):
    """They are published with 12 digits: any other constant in a formula would miss them."""
    problem = data.get_problem(name)
    f = problem(problem.scale(torch.tensor([float(digit) for digit in x], dtype=torch.float64)))
    for k in objectives:
        published = getattr(problem, bound)[k].item()
        assert f[k].item() == pytest.approx(published, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", data.PROBLEMS)
def test_nothing_is_below_the_ideal_point(name):
    problem = data.get_problem(name)
    x = points(problem, 1, 3000, 200)
    width = problem.nadir - problem.ideal
    assert (problem(x) >= problem.ideal - 2e-4 * width).all()


@pytest.mark.parametrize("name", data.PROBLEMS)
def test_sizes_bounds_ideal_and_nadir(name):
    problem = data.get_problem(name.upper())
    lower, upper = BOUNDS[name]
    assert problem.name == name and (problem.n_var, problem.n_obj) == SIZES[name]
    assert problem.lower.tolist() == pytest.approx(lower, rel=1e-14)
    assert problem.upper.tolist() == pytest.approx(upper, rel=1e-14)
    for point in (problem.ideal, problem.nadir, problem.hv_nadir):
        assert point.shape == (problem.n_obj,) and point.dtype == torch.float64
    assert (problem.ideal < problem.nadir).all() and (problem.lower < problem.upper).all()
    assert problem.source


def test_points_that_the_authors_of_copsl_divide_by():
    expected = {"re31": [500, 9e6, 2e7], "re32": [35.3096156, 17561.6, 425062977],
                "re34": [1695.72022, 11.81993945, .2903999384], "vlmop2": [1, 1],
                "vlmop3": [10, 60, 1]}
    for name in data.PROBLEMS:
        problem = data.get_problem(name)
        wanted = expected.get(name, problem.nadir.tolist())
        assert problem.hv_nadir.tolist() == pytest.approx(wanted, rel=1e-12)


def test_scale_maps_the_unit_cube_to_the_bounds():
    problem = data.get_problem("re23")
    unit = torch.tensor([[0, 1, .5, 0], [1, 0, 0, .25]])
    assert problem.scale(unit).tolist() == [[1, 100, 105, 10], [100, 1, 10, 67.5]]
    assert problem.scale(unit).dtype == torch.float32


# -- shapes, precision, gradients ----------------------------------------------------------------


@pytest.mark.parametrize("name", data.PROBLEMS)
def test_any_leading_dimensions_and_both_precisions(name):
    problem = data.get_problem(name)
    x = points(problem, 2, 6, 0)[:6]
    f = problem(x)
    assert f.shape == (6, problem.n_obj)
    assert problem(x[:0]).shape == (0, problem.n_obj)
    torch.testing.assert_close(problem(x.reshape(2, 3, -1)), f.reshape(2, 3, -1), rtol=1e-12,
                               atol=1e-300)
    torch.testing.assert_close(problem(x[3]), f[3], rtol=1e-12, atol=1e-300)
    single = problem(x.float())
    assert single.dtype == torch.float32
    assert ((single - f).abs() <= 1e-4 * f.abs() + 1e-5 * f.abs().amax(0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", data.PROBLEMS)
def test_values_and_gradients_are_finite_everywhere(name, dtype):
    """Inside, at corners, and where roots and absolute values have their kinks."""
    problem = data.get_problem(name)
    x = points(problem, 3, 100, 60)
    special = [problem.scale(torch.full((1, problem.n_var), .5, dtype=torch.float64))]
    if name in TASKS:
        z = optimum(name)
        first = problem.n_var - len(z)
        special += [torch.cat([torch.full((first,), v, dtype=torch.float64), z])[None]
                    for v in (0, .5, 1)]
    if name == "re33":  # both radii equal
        special += [torch.tensor([[v, v, 2000, 15] for v in (75, 77.3, 80)], dtype=torch.float64)]
    x = torch.cat([x, *special]).to(dtype).requires_grad_()
    f = problem(x)
    assert f.isfinite().all()
    for k in range(problem.n_obj):
        gradient, = torch.autograd.grad(f[:, k].sum(), x, retain_graph=True, allow_unused=True)
        assert gradient is not None and gradient.isfinite().all(), k


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_equal_finite_differences(name):
    problem = data.get_problem(name)
    unit = torch.from_numpy(np.random.default_rng(4).uniform(.1, .9, (2, problem.n_var)))
    size = problem(problem.scale(unit)).abs().amax(0)
    size = torch.where(size > 0, size, 1)
    assert torch.autograd.gradcheck(lambda u: problem(problem.scale(u)) / size,
                                    unit.requires_grad_(), eps=1e-6, atol=1e-5, rtol=1e-4)


def gradient_of(name, k, x):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(data.get_problem(name)(x)[k - 1], x)[0].tolist()


def test_rounded_variables_pass_their_gradient_straight_through():
    """The value is that of the rounded variable, the slope that of the formula there."""
    assert gradient_of("re22", 1, [3.09, 5, 7]) == pytest.approx([29.4, 4.2, 3])
    shell, head, x3, x4 = 8 * .0625, 3 * .0625, 50, 60
    assert gradient_of("re23", 1, [8.4, 2.6, 50, 60]) == pytest.approx([
        .0625 * (.6224 * x3 * x4 + 2 * 3.1661 * shell * x4 + 2 * 19.84 * shell * x3),
        .0625 * 1.7781 * x3 ** 2, .6224 * shell * x4 + 2 * 1.7781 * head * x3 + 19.84 * shell ** 2,
        .6224 * shell * x3 + 3.1661 * shell ** 2])
    assert gradient_of("re25", 1, [3.7, 2, .28]) == pytest.approx([  # 4 coils, wire .283
        pi ** 2 * 2 * .283 ** 2 / 4, pi ** 2 * .283 ** 2 * 6 / 4, pi ** 2 * 2 * .283 * 6 / 2])
    x1, x2, x3, x4, x5, x6, x7 = 3, .75, 21, 8, 8, 3, 5.2
    assert gradient_of("re35", 1, [x1, x2, 20.6, x4, x5, x6, x7])[2] == pytest.approx(
        .7854 * x1 * x2 ** 2 * (20 * x3 / 3 + 14.933))
    first = gradient_of("re36", 1, [30.2, 14.8, 44.9, 20.1])  # 30, 15, 45, 20: ratio 2
    assert first == pytest.approx([2 / 30, 2 / 15, -2 / 45, -2 / 20])
    assert gradient_of("re36", 2, [30.2, 14.8, 44.9, 20.1]) == [0, 0, 1, 0]


@pytest.mark.parametrize("name, x, near, far, other", [
    ("re22", [3.08, 5, 7], 3.1195, 3.1205, 3.16), ("re23", [3, 20, 50, 60], 3.49, 3.51, 4),
    ("re25", [4, 2, .3], 4.49, 4.51, 5), ("re36", [30, 20, 40, 50], 30.49, 30.51, 31)])
def test_rounded_variables_have_the_value_of_the_nearest_entry(name, x, near, far, other):
    def value(first):
        return data.get_problem(name)(torch.tensor([first, *x[1:]], dtype=torch.float64)).tolist()
    assert value(near) == pytest.approx(value(x[0]), rel=1e-13)
    assert value(far) == pytest.approx(value(other), rel=1e-13)
    assert value(far) != pytest.approx(value(near), rel=1e-4)


@pytest.mark.parametrize("name, k, table, others", [
    ("re22", 0, BARS, [10, 20]), ("re25", 2, WIRES, [20, 1])])
def test_every_entry_of_the_tables_is_the_published_one(name, k, table, others):
    """At each entry, and a bit to both sides of the middle between two."""
    problem = data.get_problem(name)
    entries = [float(word) for word in table.split() if float(word) >= problem.lower[k]]
    values = [*entries]
    for low, high in itertools.pairwise(entries):
        values += [.501 * low + .499 * high, .499 * low + .501 * high]
    x = torch.tensor([[*others[:k], value, *others[k:]] for value in values], dtype=torch.float64)
    assert_equal_to_formula(problem(x), [FORMULAS[name]([None, *row]) for row in x.tolist()])


# -- fronts --------------------------------------------------------------------------------------


def dominated(f, by):
    """Which rows of f are clearly worse than some row of `by` (rounding apart)."""
    better = (by[None] <= f[:, None] + 1e-12).all(-1) & (by[None] < f[:, None] - 1e-7).any(-1)
    return better.any(1)


def solutions(name, f):
    """Points of the published Pareto set whose image should be the front's points f (N, m)."""
    problem = data.get_problem(name)
    rows = []
    for point in f.tolist():
        if name in TASKS:
            front = TASKS[name][1]
            if front == "circle":
                place = [2 / pi * math.atan2(point[1], point[0])]
            elif front == "sphere":
                place = [2 / pi * math.asin(min(1, point[2])),
                         2 / pi * math.atan2(point[1], point[0])]
            else:
                place = [point[0]] * (2 if front == "concave, two" else 1)
            rows.append(place + optimum(name).tolist())
        elif name.startswith("dtlz"):
            x, radius = [], .5 if name[4] == "1" else 1
            for i in range(problem.n_obj, 1, -1):  # f_m depends on x_1 alone, f_{m-1} on x_2, ...
                part = min(1, point[i - 1] / radius) if radius > 1e-12 else 0
                x.append(1 - part if name[4] == "1" else 2 / pi * math.asin(part))
                radius *= 1 - part if name[4] == "1" else sqrt(1 - part ** 2)
            rows.append(x + [.5] * (problem.n_var - problem.n_obj + 1))
        elif name.startswith("zdt"):
            x1 = point[0]
            if name == "zdt6":  # f1 falls from 1 to its minimum in [0, .0814]
                low, high = 0, .08145
                for _ in range(60):
                    x1 = (low + high) / 2
                    if 1 - exp(-4 * x1) * sin(6 * pi * x1) ** 6 > point[0]:
                        low = x1
                    else:
                        high = x1
            rows.append([x1] + [0] * (problem.n_var - 1))
        elif name == "vlmop1":
            rows.append([sqrt(point[0])])
        elif name == "vlmop2":
            rows.append([(1 - sqrt(max(0, -math.log(1 - point[0])))) / sqrt(6)] * 6)
        else:
            x1, number = point[0], int(name[1])
            row = [FORMULAS[name].pareto_set(x1, j, 6) for j in range(2, 7)]
            rows.append([x1] + [v if number <= 3 else (v + 1) / 2 for v in row])
    return torch.tensor(rows, dtype=torch.float64)


def test_which_problems_have_a_formula_for_their_front():
    assert sorted(WITH_FRONT) == [n for n in data.PROBLEMS if n not in (*RE, "vlmop3")]


@pytest.mark.parametrize("name", WITH_FRONT)
def test_front_is_the_image_of_the_pareto_set_and_not_dominated(name):
    problem = data.get_problem(name)
    front = problem.front(120)
    assert front.dtype == torch.float64 and front.shape[1] == problem.n_obj
    assert 55 <= len(front) <= 130
    assert not dominated(front, front).any()
    x = solutions(name, front)
    assert (x >= problem.lower - 1e-9).all() and (x <= problem.upper + 1e-9).all()
    torch.testing.assert_close(problem(x), front, rtol=0, atol=2e-7)
    torch.testing.assert_close(data.reference_front(problem, 120), front)
    rng = np.random.default_rng(6)
    nearby = problem.scale(torch.from_numpy(rng.random((400, problem.n_var))))
    nearby[:200] = x[rng.integers(0, len(x), 200)]
    steps = (problem.upper - problem.lower) * torch.from_numpy(
        rng.normal(0, .02, (200, problem.n_var)))
    nearby[:200] = torch.minimum(torch.maximum(nearby[:200] + steps, problem.lower), problem.upper)
    assert not dominated(front, problem(nearby)).any()


@pytest.mark.parametrize("name", WITH_FRONT)
def test_front_spans_ideal_and_nadir(name):
    problem = data.get_problem(name)
    front = problem.front(400)
    torch.testing.assert_close(front.amin(0), problem.ideal, rtol=0, atol=2e-4)
    torch.testing.assert_close(front.amax(0), problem.nadir, rtol=0, atol=1e-6)


def test_zdt3_front_has_five_pieces_and_its_lowest_point():
    front = data.get_problem("zdt3").front(3000)
    gaps = front[:, 0].diff()
    assert int((gaps > .05).sum()) == 4
    assert front[:, 1].min().item() == pytest.approx(-.7733690, abs=1e-6)


@pytest.mark.parametrize("name", ["f1", "f3", "vlmop1", "vlmop2", "dtlz2-3"])
def test_search_finds_the_front_that_the_formula_gives(name):
    problem = data.get_problem(name)
    known, spread = problem.front(3000), problem.front(60)
    problem.front = None
    found = data.reference_front(problem, 60, 400)
    assert len(found) > 30 and not found.requires_grad
    assert not dominated(found, found).any()
    volume = [common.hypervolume(f / problem.nadir, [1.1] * problem.n_obj)
              for f in (found, spread, known)]
    assert .88 * volume[1] < volume[0] < volume[2] + 1e-6
    away = torch.cdist(found / problem.nadir, known / problem.nadir).amin(1)
    assert away.median().item() < .01 and away.max().item() < .03
    assert torch.equal(data.reference_front(problem, 60, 20), data.reference_front(problem, 60, 20))


def test_search_of_a_real_world_problem_reaches_between_ideal_and_nadir():
    problem = data.get_problem("re21")
    found = data.reference_front(problem, 100, 300)
    scaled = (found - problem.ideal) / (problem.nadir - problem.ideal)
    assert len(found) > 50 and (scaled > -1e-9).all() and (scaled < 1 + 1e-9).all()
    assert (scaled.amin(0) < .02).all() and (scaled.amax(0) > .95).all()


# -- das_dennis ----------------------------------------------------------------------------------


def test_das_dennis_of_three_objectives_and_105_points_has_13_divisions():
    p = data.das_dennis(3, 105)
    assert p.shape == (105, 3) and p.dtype == torch.float64
    units = (13 * p).round()
    torch.testing.assert_close(13 * p, units)
    wanted = {(i, j, 13 - i - j) for i in range(14) for j in range(14 - i)}
    assert {tuple(int(v) for v in row) for row in units.tolist()} == wanted
    assert len(wanted) == 105


@pytest.mark.parametrize("m, count, parts", [
    (2, 2, 1), (2, 100, 99), (3, 104, 12), (3, 1, 1), (4, 120, 7), (5, 126, 5), (6, 5, 1)])
def test_das_dennis_takes_as_many_divisions_as_fit(m, count, parts):
    p = data.das_dennis(m, count)
    assert len(p) == math.comb(parts + m - 1, m - 1) == len(p.unique(dim=0))
    assert (p >= 0).all() and p.amax().item() == 1
    torch.testing.assert_close(p.sum(1), torch.ones(len(p), dtype=torch.float64))
    for k in range(m):
        assert (p[:, k] == 1).sum() == 1
    assert p[p > 0].min().item() == pytest.approx(1 / parts)


# -- looking problems up -------------------------------------------------------------------------


def test_unknown_name_lists_what_exists():
    with pytest.raises(UserError, match="the problem 're99' is unknown") as error:
        data.get_problem("RE99")
    assert all(f"{name}," in str(error.value) or f"{name} and" in str(error.value)
               for name in data.PROBLEMS)
    assert "FILE.py:NAME" in str(error.value) and "\n" not in str(error.value)


def test_any_case_is_accepted():
    x = torch.full((1, 6), .3, dtype=torch.float64)
    assert torch.equal(data.get_problem("F5")(x), data.get_problem("f5")(x))
    assert data.get_problem("NiMs2").name == "nims2"
    assert data.get_problem("Re91").name == "re91"


def test_matrix_file_is_read_and_without_it_a_seeded_one_stands_in(tmp_path):
    stand_in, found = data.mtmo_matrix("cims2", 9, tmp_path, 3)
    assert not found and stand_in.shape == (9, 9) and stand_in.dtype == torch.float64
    assert torch.equal(data.mtmo_matrix("cims2", 9, tmp_path, 3)[0], stand_in)
    assert not torch.equal(data.mtmo_matrix("cims2", 9, tmp_path, 4)[0], stand_in)
    assert .2 < stand_in.std().item() < .5  # 1 / √9
    (tmp_path / "mtmo").mkdir()
    written = np.arange(81.).reshape(9, 9)
    np.savetxt(tmp_path / "mtmo" / "cims2.txt", written)
    matrix, found = data.mtmo_matrix("cims2", 9, tmp_path, 3)
    assert found and matrix.tolist() == written.tolist() and matrix.dtype == torch.float64


@pytest.mark.parametrize("content", [
    "", "1 2\n3 4\n", "a b c\n" * 9, "1 2 3 4 5 6 7 8 9\n" * 8, "1 2 3 4 5 6 7 8\n" * 9,
    "1 2 3 4 5 6 7 8 nan\n" * 9, "1 2 3 4 5 6 7 8 inf\n" * 9,
    "0,1 0,2 0,3 0,4 0,5 0,6 0,7 0,8 1\n" * 9,
    "1 2 3\n4 5\n", " ".join(["1"] * 81)])
def test_malformed_matrix_file_is_refused(content, tmp_path):
    (tmp_path / "mtmo").mkdir()
    path = tmp_path / "mtmo" / "cims2.txt"
    path.write_text(content)
    with pytest.raises(UserError, match="must hold 9 x 9 plain numbers") as error:
        data.get_problem("cims2", tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name, write", [
    ("cims2.txt", lambda rows: "\ufeff" + "\n".join(" ".join(r) for r in rows)),
    ("cims2.txt", lambda rows: "\r\n".join(", ".join(r) for r in rows) + "\r\n\r\n"),
    ("CIMS2.txt", lambda rows: "\n".join(";".join(r) for r in rows)),
    ("cims2.csv", lambda rows: ("# rows\n" + "\n".join("\t".join(r) for r in rows))
        .encode("utf-16"))], ids=["mark", "commas", "capitals", "utf-16"])
def test_matrix_file_as_people_have_it(name, write, tmp_path):
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(9, 9))
    (tmp_path / "mtmo").mkdir()
    text = write([[repr(float(v)) for v in row] for row in matrix])
    (tmp_path / "mtmo" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    read, found = data.mtmo_matrix("cims2", 9, tmp_path)
    assert found and read.tolist() == matrix.tolist()
    (tmp_path / "mtmo" / "Cims2.TXT").write_text("1")
    with pytest.raises(UserError, match="are both there for cims2"):
        data.mtmo_matrix("cims2", 9, tmp_path)


def test_binary_matrix_file_is_refused(tmp_path):
    (tmp_path / "mtmo").mkdir()
    (tmp_path / "mtmo" / "nims2.txt").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="must hold 18 x 18 plain numbers"):
        data.get_problem("nims2", tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_shift_moves_the_optimum_inside_the_bounds(name):
    """`shift` is a share of half the width; the optimum moves, the front stays."""
    plain, moved = data.get_problem(name), data.get_problem(name, shift=.3)
    z = optimum(name)
    first = plain.n_var - len(z)
    x = torch.cat([torch.full((first,), .5, dtype=torch.float64), z])
    _, _, low, high, _, _ = TASKS[name]
    drawn = torch.from_numpy(common.numpy_generator(0, "mtmo-shift", name).uniform(-1, 1, len(z)))
    there = z + .3 * (high - low) / 2 * drawn
    there = torch.where(there < low, 2 * low - there, there)
    there = torch.where(there > high, 2 * high - there, there)
    assert (there - z).abs().max() > .2 * (high - low) / 2
    y = torch.cat([x[:first], there])
    assert (y >= moved.lower).all() and (y <= moved.upper).all()
    torch.testing.assert_close(moved(y), plain(x), rtol=0, atol=1e-9)
    assert (moved(x) - plain(x)).abs().max() > 1e-3
    assert torch.equal(moved.front(30), plain.front(30))
    again, other = (data.get_problem(name, seed=s, shift=.3) for s in (0, 1))
    assert torch.equal(again(y), moved(y)) and not torch.equal(other(y), moved(y))


def test_noise_of_re91_is_seeded_and_drawn_at_every_call():
    x = points(data.get_problem("re91"))
    still = data.get_problem("re91")
    noisy, again, other = (data.get_problem("re91", seed=s, noise=True) for s in (0, 0, 1))
    first, second = noisy(x), noisy(x)
    assert torch.equal(still(x), still(x)) and not torch.equal(first, second)
    assert torch.equal(again(x), first) and torch.equal(again(x), second)
    assert not torch.equal(other(x), first)
    assert torch.equal(first[:, 0], still(x)[:, 0])  # the weight has no random variable
    same = noisy(x[:1].expand(2000, -1))
    assert len(same.unique(dim=0)) == 2000
    assert noisy(x.float().reshape(2, -1, 7)).dtype == torch.float32


def test_noise_of_re91_enters_as_published(monkeypatch):
    problem = data.get_problem("re91", noise=True)
    x = points(problem)
    normal = torch.from_numpy(np.random.default_rng(8).normal(size=(len(x), 4)))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: normal.reshape(shape))
    expected = [re91([None, *row], z) for row, z in zip(x.tolist(), normal.tolist(), strict=True)]
    assert_equal_to_formula(problem(x), expected)


# -- problems of the user's own ------------------------------------------------------------------

GOOD = """
import torch

def both(x):
    return torch.stack([x[:, 0] ** 2, (x[:, 0] - 2) ** 2 + x[:, 1]], 1)

class Plain:
    lower, upper, n_obj = [0, 0], [2, 1], 2
    def __call__(self, x):
        return both(x)

class Full(Plain):
    ideal, nadir = [-1, -2], [5, 6]
    def front(self, count):
        f1 = torch.linspace(0, 4, count, dtype=torch.float64)
        return torch.stack([f1, (f1.sqrt() - 2) ** 2], 1)

class Layer(torch.nn.Module):
    lower, upper, n_obj = torch.zeros(2), torch.tensor([2., 1.]), 2
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2))
    def forward(self, x):
        return both(x) * self.scale

instance = Full()

def function(x):
    return both(x)
function.lower, function.upper, function.n_obj = [0, 0], [2, 1], 2
"""


@pytest.mark.parametrize("name", ["Plain", "Full", "Layer", "instance", "function"])
def test_own_problem_of_every_kind(name, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    problem = data.get_problem(f"{path}:{name}")
    assert (problem.name, problem.n_var, problem.n_obj) == (name, 2, 2)
    assert problem.lower.tolist() == [0, 0] and problem.upper.tolist() == [2, 1]
    f = problem(torch.tensor([[[.5, .25]], [[2, 1]]], dtype=torch.float64))
    assert f.tolist() == [[[.25, 2.5]], [[4, 1]]]
    assert problem(torch.tensor([1., 1.])).tolist() == [1, 2]
    if name in ("Full", "instance"):
        assert problem.ideal.tolist() == [-1, -2] and problem.nadir.tolist() == [5, 6]
        assert torch.equal(data.reference_front(problem, 7), problem.front(7))
        assert torch.equal(problem.hv_nadir, problem.nadir) and problem.estimated == []
    else:
        assert problem.estimated == ["ideal", "nadir"] and problem.front is None
        assert problem.ideal.isnan().all() and problem.nadir.isnan().all()
        # the front is f2 = (√f1 - 2)² from (0, 4) to (4, 0), sampled here with an end unfinished
        t = torch.linspace(0, 2, 101, dtype=torch.float64)
        front = torch.stack([t ** 2, (t - 2) ** 2], 1)
        front[0] = torch.tensor([-1e-5, 9])
        assert problem.estimate(front, front.amin(0)) == []
        assert problem.ideal.tolist() == pytest.approx([-1e-5, 0])
        assert problem.nadir.tolist() == pytest.approx([4, 3.9204])  # that of t = .02
    assert not problem.ideal.requires_grad and not problem.nadir.requires_grad
    assert "2 variables, 2 objectives" in problem.said and "in all variables" in problem.said


CLASS = """
import torch
class P:
    lower, upper, n_obj = [0, 0], [1, 1], 2
    def __call__(self, x):
        return torch.stack([x[:, 0], 1 - x[:, 0] + x[:, 1]], 1)
"""


BELOW = int((common.numpy_generator(0, "own").random((32, 2))[:, 0] < .5).sum())  # x1 < .5


@pytest.mark.parametrize("content, message", [
    ("class P:\n    def (:\n", "SyntaxError"),
    ("import no_such_module_x\nP = 1", "No module named"),
    ("Q = 1", "expected FILE.py:NAME with one of what is in the file: no callable with n_obj"),
    (CLASS.replace("class P", "class Truss"), "what is in the file: Truss"),
    ("P = 3", "has no attribute 'lower'"),
    ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    ("import sys\nsys.exit(1)", "SystemExit"),
    ("open('none.txt')\n", "No such file or directory: 'none.txt'"),
    (CLASS.replace("lower, upper, n_obj", "lower, upper, other"), "has no attribute 'n_obj'"),
    (CLASS.replace("lower, upper", "lower, top"), "has no attribute 'upper'"),
    (CLASS.replace("lower, upper", "low, upper"), "has no attribute 'lower'"),
    (CLASS.replace("def __call__", "def call"), "TypeError: 'P' object is not callable"),
    (CLASS.replace("self, x", "self"), "TypeError"),
    (CLASS.replace("def __call__", "def __init__(self, a, *, b): pass\n    def __call__"),
     "the class P needs a, b; make an instance in the file"),
    (CLASS.replace("2\n", "3\n"), "got shape (32, 2): n_obj says 3, but there are 2"),
    (CLASS.replace("2\n", "1\n"), "n_obj >= 2"),
    (CLASS.replace("2\n", "'two'\n"), "ValueError"),
    (CLASS.replace("return torch", "return x[:, 0]\n        torch"), "got shape (32,)"),
    (CLASS.replace("return ", "return 1 or "), "it returns a builtins.int, not a tensor"),
    (CLASS.replace(", 1)", ", 1).numpy()"), "no gradient comes out of P: it is NumPy code"),
    (CLASS.replace("[x[:, 0]", "[torch.from_numpy(__import__('numpy').sin(x[:, 0]))"),
     "no gradient comes out of P: it is NumPy code"),
    (CLASS.replace("(self, x):", "(self, x):\n        x = x.detach()"),
     "use torch functions of x all the way (the file has detach)"),
    (CLASS.replace(", 1)", ", 1).long()"), "no gradient comes out of P: torch cannot follow its "
     "values (torch.int64)"),
    (CLASS.replace("(self, x):", "(self, x):\n        x = (9 * x).round() / 9"),
     "the gradient of P is 0 in all its variables: its values change without one"),
    (CLASS.replace("[x[:, 0], 1 - x[:, 0] + x[:, 1]]", "[0 * x[:, 0], 0 * x[:, 1]]"),
     "the gradient of P is 0 in all its variables: its values do not change with x"),
    (CLASS.replace("[x[:, 0],", "[(x[:, 0] - .5).sqrt(),"), "it is not finite (NaN or infinity) at "
     f"{BELOW} of 32 random points of its box, e.g. x = [0.1903, 0.4257]"),
    (CLASS.replace("[x[:, 0]", "[x[:, 0] / 0"), "at 32 of 32 random points"),
    (CLASS.replace("[x[:, 0]", "[torch.where(x[:, 0] > .5, (x[:, 0] - .5).sqrt(), x[:, 0])"),
     f"its values are finite, but its gradient is not (NaN or infinity) at {BELOW} of 32"),
    (CLASS.replace("[x[:, 0]", "[x[:, 0] * x.mean()"), "with the other points of the batch"),
    (CLASS.replace("[1, 1]", "[1, 0]"), "expected lower < upper"),
    (CLASS.replace("[1, 1]", "[1, -1]"), "expected lower < upper"),
    (CLASS.replace("[1, 1]", "[1, float('nan')]"), "expected lower < upper"),
    (CLASS.replace("[1, 1]", "[1, float('inf')]"), "expected lower < upper"),
    (CLASS.replace("[1, 1]", "[1, 1, 1]"), "expected lower < upper"),
    (CLASS.replace("[1, 1]", "[1]"), "expected lower < upper"),
    (CLASS.replace("[1, 1]", "1"), "expected lower < upper"),
    (CLASS.replace("[1, 1]", "'ab'"), "TypeError"),
    (CLASS + "    ideal = 'zero'\n", "TypeError"), (CLASS + "    ideal = [0, 0, 0]\n", "Error"),
    (CLASS + "    ideal, nadir = [0, 0], [0, -5]\n", "expected ideal < nadir"),
    (CLASS + "    ideal = [0, float('nan')]\n", "expected finite numbers as ideal"),
    (CLASS + "    def front(self, count): return torch.zeros(count, 3)\n", "got shape (10, 3)")])
def test_own_problem_that_does_not_fit_is_one_clear_line(content, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        data.get_problem(f"{path}:P")
    line = str(error.value)
    assert line.startswith(f"--problems {path}:P: ") and message in line
    assert "\n" not in line


def both(x):
    return torch.stack([x[:, 0], 1 - x[:, 0] + x[:, 1]], 1)


@pytest.mark.parametrize("change, remark", [
    (("", ""), None),
    ((", 1)", ", 0)"), "objectives in rows, turned round"),
    (("[x[:, 0], 1 - x[:, 0] + x[:, 1]], 1", "[x[0], 1 - x[0] + x[1]]"),
     "called with one point at a time, which is slow"),
    (("torch.stack([x[:, 0], 1 - x[:, 0] + x[:, 1]], 1)", "x[:, 0], 1 - x[:, 0] + x[:, 1]"), None),
    (("(self, x):", "(self, x):\n        x = x.float()"), None),
    (("(self, x):", "(self, x):\n        x = x @ torch.eye(2)"), "called in float32 (in float64: "),
    (("(self, x):", "(self, x):\n        x[:, 0] *= 1"), None),
    (("(self, x):", "(self, x):\n        print('RESULT')"), None),
    (("(self, x):", "(self, x):\n        x = x + (x.round() - x).detach()"), None)],
    ids=["plain", "rows", "one point", "a list", "to float32", "float32", "in place", "prints",
         "integers"])
def test_own_problem_is_called_as_it_wants_to_be(change, remark, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(CLASS.replace(*change))
    problem = data.get_problem(f"{path}:P")
    x = torch.tensor([[.25, .5], [1, .75], [0, 1]], requires_grad=True)
    expected = both(x.detach().round() if "round" in change[1] else x.detach()).double()
    f = problem(x)
    torch.testing.assert_close(f.detach(), expected, rtol=0, atol=1e-6)
    f.sum().backward()
    assert x.grad.tolist() == [[0, 1]] * 3  # straight through, where it rounds
    assert x.tolist() == [[.25, .5], [1, .75], [0, 1]]
    assert (remark in problem.said) if remark else "called" not in problem.said
    assert capsys.readouterr().out == ""


NET = """
import torch
class P(torch.nn.Module):
    lower, upper, n_obj = [0, 0], [1, 1], 2
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(.5))
    def forward(self, x):
        return self.net(x)
"""


def test_own_network_is_evaluated_not_trained(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    problem = data.get_problem(f"{tmp_path / 'net.py'}:P")
    weights = problem.function.net[0]
    x = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(problem(x), x @ weights.weight.T + weights.bias)
    problem(x).sum().backward()
    assert weights.weight.grad is None and x.grad.abs().min() > 0


def test_own_problem_says_which_variables_have_no_gradient(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CLASS.replace("[1, 1]", "[1, 1, 1]").replace("[0, 0]", "[0, 0, 0]").replace(
        "x[:, 1]]", "(3 * x[:, 1]).round()]"))
    said = data.get_problem(f"{path}:P").said
    assert "gradients in x1; none in x2: its values change without one" in said
    assert "(x.round() - x).detach()" in said
    assert "none in x3, on which its values did not depend" in said
    path.write_text(CLASS.replace("x[:, 0], 1 -", "0 * x[:, 0], 1 -"))
    assert "in all variables; none of objective 1" in data.get_problem(f"{path}:P").said
    path.write_text(CLASS.replace(", 1)", ", 1) + .1 * torch.randn(len(x), 2)"))
    assert "values change from call to call" in data.get_problem(f"{path}:P").said


def test_own_problem_in_float64_keeps_what_an_offset_leaves(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CLASS.replace(", 1)", ", 1) + 2e9"))
    f = data.get_problem(f"{path}:P")(torch.tensor([[.25, .5]]))
    assert (f - 2e9).tolist()[0] == pytest.approx([.25, 1.25], abs=1e-6)


def test_own_problem_that_fails_later_says_where(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CLASS.replace("[x[:, 0]", "[(x[:, 0] + .01).log()").replace(
        "(self, x):", "(self, x):\n        assert not (x > 5).any(), 'too large'"))
    problem = data.get_problem(f"{path}:P")
    with pytest.raises(UserError, match="problem P is not finite") as error:
        problem(torch.tensor([[.5, .5], [-.5, .25]]))
    assert "at x = [-0.5, 0.25]" in str(error.value) and error.value.code == 3
    with pytest.raises(UserError, match="problem P: AssertionError: too large"):
        problem(torch.full((1, 2), 9.))
    assert problem(torch.full((1, 2), torch.nan)).isnan().all()  # training's fault, not the file's


def test_own_file_finds_its_neighbours(tmp_path, monkeypatch, capsys):
    """Modules and tables beside it, whatever they are called, and of two folders each its own."""
    monkeypatch.chdir(tmp_path)
    for folder, factor in (("a", 2), ("b b", 3)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "factors.py").write_text(f"FACTOR = {factor}")
        (tmp_path / folder / "data.py").write_text("OFFSET = 1")
        (tmp_path / folder / "offset.txt").write_text("5")
        (tmp_path / folder / "my.own v2.py").write_text(
            "from factors import FACTOR\nimport data\nprint('hello')\n"
            "MORE = data.OFFSET + float(open('offset.txt').read())\n"
            + CLASS.replace(", 1)", ", 1) * FACTOR + MORE"))
    monkeypatch.setattr(data.sys, "path", list(data.sys.path))
    name = "my.own v2.py"
    for spec, factor in ((f"a/{name}:P", 2), (f"b b/{name}:P", 3), (f"b b\\{name}", 3)):
        f = data.get_problem(spec)(torch.tensor([.25, .5]))
        assert f.tolist() == [.25 * factor + 6, 1.25 * factor + 6]
    assert data.sys.modules["data"] is data and Path.cwd() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.get_problem("~/a/my.own v2.py:P").name == "P"
    assert "hello" not in capsys.readouterr().out


def test_names_of_problems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "a b.py", "x,y.py", "f1,mine.py"):
        (tmp_path / name).write_text(CLASS)
    groups = {"re": ["re31", "re32"]}
    for words, names in (
            (["F1,f2"], ["f1", "f2"]), (["f1,", "f2"], ["f1", "f2"]), (["f1 f2"], ["f1", "f2"]),
            (["RE, zdt1", "f1"], ["re31", "re32", "zdt1", "f1"]), (["re", "re31"],
                                                                  ["re31", "re32", "re31"]),
            (["f1,mine.py:P,DTLZ2-3"], ["f1", "mine.py:P", "dtlz2-3"]),
            (["mine.py:P", "a b.py:P,x,y.py:P"], ["mine.py:P", "a b.py:P", "x,y.py:P"]),
            (["nowhere.py:Truss"], ["nowhere.py:Truss"]), (["./mine.py"], ["./mine.py"])):
        if names == ["f1", "mine.py:P", "dtlz2-3"]:
            with pytest.raises(UserError, match="that is a file, and f1 mine"):
                data.problem_names(words, groups)
            (tmp_path / "f1,mine.py").unlink()
        assert data.problem_names(words, groups) == names
    with pytest.raises(UserError, match="names nothing"):
        data.problem_names([",", " "], groups)


def test_problems_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            CLASS + "class F1(P): pass\nclass dtlz2_3(P): pass")
    problems = data.get_problems(["a/mine.py:P", "b/mine.py:P", "./a/mine.py:P", "a/mine.py:F1",
                                  "f1", "F1", "a/mine.py:dtlz2_3", "dtlz2-3"])
    assert [p.name for p in problems] == ["a/mine.py:P", "b/mine.py:P", "a/mine.py:F1", "f1",
                                          "dtlz2_3", "dtlz2-3"]
    assert [p.named for p in problems] == [2, 1, 1, 2, 1, 1]
    for name in ("hv=1", "hv 1", "HV-1", "größe"):
        problems.append(data.get_problem("f1"))
        problems[-1].name = name
    names = data.file_names(problems)
    assert names[:3] == ["a-mine-py-P", "b-mine-py-P", "a-mine-py-F1"]
    assert names[3:] == ["f1", "dtlz2_3", "dtlz2-3", "hv-1", "hv-1-2", "HV-1-3", "größe"]
    assert len({n.lower() for n in names}) == len(names)


def test_what_is_remembered_of_a_problem_hangs_on_values_not_on_last_bits(tmp_path):
    path, seen = tmp_path / "mine.py", {}
    for key, content in {
            "same": CLASS, "bits": CLASS.replace("- x[:, 0]", "- x[:, 0] * (1 + 1e-13)"),
            "small": CLASS.replace(", 1)", ", 1) + torch.tensor([2e7, 0])"),
            "small, changed": CLASS.replace("+ x[:, 1]", "+ x[:, 1] * 1.001")
                .replace(", 1)", ", 1) + torch.tensor([2e7, 0])"),
            "bounds": CLASS.replace("[1, 1]", "[1, 2]"),
            "ideal": CLASS + "    ideal = [0, 0]", "nadir": CLASS + "    nadir = [1, 1]"}.items():
        path.write_text(content)
        seen[key] = common.fingerprint(data._fixed_values(data.get_problem(f"{path}:P")))
    assert seen.pop("bits") == seen["same"] and len(set(seen.values())) == len(seen)
    plain, moved, other = (common.fingerprint(data._fixed_values(data.get_problem(
        "cims2", tmp_path, **more))) for more in ({}, {"shift": .1}, {"seed": 1}))
    assert len({plain, moved, other}) == 3


@pytest.mark.parametrize("evaluations", [0, 50, 3300, 402_000, 10 ** 8])
@pytest.mark.parametrize("m", range(2, 11))
def test_search_takes_no_more_evaluations_than_training(m, evaluations):
    count, steps = data.search_size(m, evaluations)
    assert count * (steps + 1) <= evaluations and count <= 1000 and steps <= 1000
    assert count == len(data.das_dennis(m, count)) if count else evaluations < 11 * m
    assert data.search_size(m, evaluations, 0) == (0, 0)
    assert data.search_size(m, evaluations, m) == (m, 1000)


def test_search_leaves_out_where_a_function_is_not_finite(tmp_path):
    path, notes = tmp_path / "mine.py", []
    path.write_text(CLASS.replace("[1, 1]", "[1, 3]").replace(
        "x[:, 1]]", "torch.where((x[:, 0] > .7) & (x[:, 1] < .1), torch.nan, x[:, 1])]"))
    problem = data.get_problem(f"{path}:P")
    problem.ideal, problem.nadir = torch.zeros(2).double(), torch.ones(2).double()
    front = data.reference_front(problem, 40, 600, warn=notes.append)
    assert len(notes) == 1 and "of 40 points of the reference search are not finite" in notes[0]
    assert len(front) > 10 and front.isfinite().all()
    low = front[:, 0] < .69
    torch.testing.assert_close(front[low].sum(1), torch.ones(int(low.sum())).double(), rtol=0,
                               atol=.02)


def test_given_range_that_is_beaten_and_objectives_that_do_not_conflict_are_told(tmp_path):
    path = tmp_path / "mine.py"
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    front = torch.stack([t, 1 - t], 1)
    path.write_text(CLASS + "    ideal, nadir = [.5, 0], [2, .4]\n")
    problem = data.get_problem(f"{path}:P")
    assert problem.estimate(front, front.amin(0)) == []
    told = problem.beaten(front, front.amin(0))
    assert [t[:44] for t in told] == ["objective 1 reaches 0 on the fronts found, b",
                                      "objective 2 reaches 1 on the fronts found, b"]
    assert "its ideal 0.5" in told[0] and "its nadir 0.4" in told[1]
    path.write_text(CLASS)
    problem = data.get_problem(f"{path}:P")
    told, = problem.estimate(front[:1], front[0])
    assert "do not conflict" in told
    assert problem.ideal.tolist() == [0, 1] and (problem.nadir > problem.ideal).all()
    problem.unit = torch.ones(3).double()
    front3 = torch.stack([t, 1 - t, 0 * t + 4], 1)
    told, = problem.estimate(front3, front3.amin(0))
    assert "objective 3 is the same" in told and problem.nadir.tolist() == [1, 1, 5]
    path.write_text(CLASS + "    nadir = [-5, 2]\n")
    problem = data.get_problem(f"{path}:P")
    told, = problem.estimate(front, front.amin(0))
    assert "objective 1: nothing found lies below the nadir" in told
    assert problem.nadir.tolist() == [-5, 2] and (problem.ideal < problem.nadir).all()


@pytest.mark.parametrize("outlier", [2.0, 1e6])
def test_nadir_leaves_out_points_that_pay_for_little_with_much(outlier):
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    front = torch.stack([t, 1 - t.sqrt()], 1)  # as ZDT1's
    assert data._proper(front).all()
    for j in (0, 1):
        end = front[front[:, 1 - j].argmin()][None].clone()
        end[0, 1 - j] -= 1e-5
        end[0, j] += outlier
        keep = data._proper(torch.cat([front, end]))
        assert keep[:-1].all() and not keep[-1]


def test_own_problem_without_its_file_is_refused(tmp_path):
    for path in (tmp_path / "none.py", tmp_path / "folder.py"):
        (tmp_path / "folder.py").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="there is no file") as error:
            data.get_problem(f"{path}:P")
        assert str(path) in str(error.value)


def test_own_problem_without_a_front_is_searched(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    problem = data.get_problem(f"{path}:function")
    found = data.reference_front(problem, 30, 300)
    assert len(found) > 15
    root = found[:, 0].sqrt()
    torch.testing.assert_close(found[:, 1], (root - 2) ** 2, rtol=0, atol=.06)
    assert found[:, 0].min() < .3 and found[:, 0].max() > 3
    assert data.reference_front(problem, 0).shape == (0, 2)


def test_a_file_that_draws_numbers_draws_the_same_in_every_run(tmp_path):
    (tmp_path / "drawn.py").write_text(
        "import torch\nclass P:\n    lower, upper, n_obj = [0.] * 2, [1.] * 2, 2\n"
        "    def __init__(self): self.w = torch.rand(2, 2, dtype=torch.float64)\n"
        "    def __call__(self, x): return (x - self.w[0]) ** 2 @ self.w.abs()\n")
    state = torch.get_rng_state()
    first, second = (data.get_problem(f"{tmp_path}/drawn.py:P") for _ in range(2))
    x = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first(x), second(x)) and torch.equal(torch.get_rng_state(), state)
