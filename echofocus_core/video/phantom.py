"""Ultrasound-like heart phantoms with a given ejection fraction and septal defect.

A phantom is a static end-diastolic scene in cm (echo strength with speckle, blood flow), which is
warped for each frame to its phase of the beat. The left-ventricular cavity is an ellipsoid with
long axis L and short axis S (cm); its volume is V = pi / 6 L S^2 (mL), and in each beat V falls
exactly from the end-diastolic EDV to EDV (1 - EF / 100). `make_cohort` writes a folder like the
export of a small hospital: four videos per study, labels, and which videos show the defect.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

HALF_ANGLE = 0.74  # radians: half the opening angle of the fan
# The beat: phase 0 is end-diastole. Both isovolumic plateaus are longer than a frame, so that a
# video of at least one beat has a frame at each extreme. Filling: early, pause, atrial kick.
PHASES = (0.0, 0.08, 0.40, 0.48, 0.64, 0.80, 0.96, 1.0)
EMPTYING = (0.0, 0.0, 1.0, 1.0, 0.25, 0.20, 0.0, 0.0)  # part of the stroke volume ejected


@dataclass(frozen=True)
class View:
    """The position of a view's left ventricle, and whether colour Doppler is on."""

    centre: tuple  # (x, z) of its cavity, cm right of and below the probe
    angle: float  # degrees clockwise from 'apex up' with the septum on the left
    depth: float = 15.0  # cm from the probe (top centre) to the bottom of the fan
    mirror: bool = False  # septum and free wall change sides
    across: bool = False  # a cut across the long axis: a round cavity
    colour: bool = False
    haze: float = 0.0  # echo strength of the tissue in front of the heart (the liver in SUBC)


VIEWS = {
    "A4C": View((1.3, 6.6), 0, depth=13.5, colour=True),
    "PLAX": View((-0.8, 8.2), -80, mirror=True),
    "PSAX": View((1.0, 5.8), 20, depth=11.0, across=True, colour=True),
    "SUBC": View((0.8, 9.0), 105, haze=0.25),
}
DEFECT_VIEWS = ("A4C", "PSAX")  # the other views do not cut through the defect


@dataclass(frozen=True)
class Heart:
    """A left ventricle at end-diastole: EF in percent, inner axes and wall thickness in cm."""

    ef: float
    long: float
    short: float
    wall: float


def draw_heart(ef, rng):
    """A plausible heart with this EF (percent): failing ventricles are dilated and thin-walled."""
    failing = np.clip((65 - ef) / 50, -0.2, 1.0)
    short = 4.1 + 2.4 * failing + rng.normal(0, 0.15)
    long = short * rng.normal(1.72, 0.05) - 1.2 * failing
    wall = 1.2 - 0.5 * failing + rng.normal(0, 0.06)
    return Heart(float(ef), float(long), float(short), float(wall))


def volume(long, short):
    """Cavity volume (mL) of an ellipsoid with these axes (cm)."""
    return np.pi / 6 * long * short**2


def half_axes(long, short, across):
    """The cavity's half axes in a view: floats (towards the base, away from the septum), cm."""
    return float(short if across else long) / 2, float(short) / 2


def cavity_axes(heart, phase):
    """Cavity axes (long, short), cm, at `phase` (beats since end-diastole; numbers or arrays)."""
    left = 1 - heart.ef / 100 * np.interp(np.mod(phase, 1.0), PHASES, EMPTYING)
    return heart.long * left**0.3, heart.short * left**0.35  # L S^2 goes as `left`


# ------------------------------------------------------------------------------------------ scene


def ellipse(u, v, centre, axes, edge=0.12):
    """A soft-edged filled ellipse: 1 within, 0 outside; all in cm."""
    r = np.hypot((u - centre[0]) / axes[0], (v - centre[1]) / axes[1])
    return np.clip(0.5 + (1 - r) * min(axes) / (2 * edge), 0, 1)


def speckle(shape, grain, rng):
    """Rayleigh speckle of mean 1 with grains of about `grain` (rows, columns) pixels."""
    parts = rng.standard_normal((2, *shape), dtype=np.float32)
    parts = [cv2.GaussianBlur(p, (0, 0), grain[1], sigmaY=grain[0]) for p in parts]
    amplitude = np.hypot(*parts)
    return amplitude / amplitude.mean()


def draw_scene(view, heart, shows_defect, u, v, rng):
    """The end-diastolic scene on a grid: float32 (H, W, 4).

    `u` (towards the base) and `v` (away from the septum) are cm from the cavity's centre.
    Channels: echo strength, inflow, outflow (signed: towards the probe or away) and defect jet.
    """
    (a, b), w = half_axes(heart.long, heart.short, view.across), heart.wall
    rv = (0.8 * a, 1.5) if not view.across else (1.1 * a + w, 1.7)
    rv_at = (0.1 * a, -(b + w + 0.75 * rv[1]))
    echo = np.full(u.shape, 0.16) + view.haze * ellipse(u, v, rv_at, (20, 3.5 + rv[1]), 1.5)
    echo += 0.25 * (ellipse(u, v, (0, -1.2), (a + w + 0.6, b + w + 2.8)) - 0.5).clip(0)
    chambers = [(rv_at, rv, 0.4)]
    if not view.across:
        chambers += [((a + 2.2, 0.3), (1.9, 1.8), 0.25), ((a + 1.9, -b - w), (1.7, 1.6), 0.25)]
    for at, axes, rim in chambers:
        echo += (0.55 - echo) * ellipse(u, v, at, np.add(axes, rim))
        echo += (0.03 - echo) * ellipse(u, v, at, axes)
    echo += (0.75 - echo) * ellipse(u, v, (0, 0), (a + w, b + w))
    lv = ellipse(u, v, (0, 0), (a, b))
    echo += (0.03 - echo) * lv
    # Always drawn, so that everything else is the same with and without a defect.
    gap, width = (rng.uniform(-0.3, 0.1) * a, -b - w / 2), rng.uniform(0.6, 0.9)
    jet = np.zeros_like(u)
    if shows_defect:
        echo += (0.03 - echo) * ellipse(u, v, gap, (width, w / 2 + 0.45))
        spread = width * (1 + 0.5 * (gap[1] - v).clip(0))
        jet = np.exp(-(((u - gap[0]) / spread) ** 2)) * ellipse(
            u, v, (gap[0], gap[1] - 1.2), (9, w / 2 + 2.2), 0.4
        )
    inflow = np.exp(-(((v - 0.2 * b) / (0.5 * b)) ** 2)) * (lv + ellipse(u, v, rv_at, rv))
    outflow = np.exp(-(((v + 0.3 * b) / (0.4 * b)) ** 2)) * lv
    return np.stack([echo, inflow, -outflow, jet], axis=-1).astype(np.float32)


def colourise(grey, velocity, jet, rng):
    """Grey (H, W) 0..1 -> BGR float (H, W, 3) in a variance map: red towards the probe, blue away.

    Turbulent flow (`jet` of 0..1 above 0.25) is a mosaic of both, with green for its variance.
    """
    shape = (grey.shape[0] // 3 + 1, grey.shape[1] // 3 + 1)
    patches = rng.uniform(-1, 1, (*shape, 2)).astype(np.float32)
    patches = cv2.resize(patches, grey.shape[::-1], interpolation=cv2.INTER_LINEAR)
    turbulent = jet > 0.25
    velocity = np.where(turbulent, patches[..., 0], velocity).clip(-1, 1)
    bright = 0.25 + 0.4 * np.abs(velocity) + 0.35 * turbulent
    green = turbulent * (0.85 + 0.15 * patches[..., 1])
    flow = np.stack([bright * (velocity < 0), green, bright * (velocity > 0)], axis=-1)
    shown = turbulent | ((np.abs(velocity) > 0.15) & (grey < 0.2))
    return np.where(shown[..., None], flow, grey[..., None])


# ------------------------------------------------------------------------------------------- cine


def displace(u, v, start, now):
    """The end-diastolic position of the tissue at (u, v), from the cavity's half axes then and now.

    A plain scaling within the cavity, so that its outline is exactly an ellipse with these axes;
    less scaling further out, so that the wall thickens in systole.
    """
    (a0, b0), (a, b) = start, now
    reach = np.exp(-1.5 * (np.hypot(u / a, v / b) - 1).clip(0))
    return u * (1 + (a0 / a - 1) * reach), v * (1 + (b0 / b - 1) * reach)


def phantom_cine(view="A4C", ef=60.0, shows_defect=False, frames=16, size=(120, 160), seed=0,
                 heart=None):  # fmt: skip
    """A cine of one view: uint8 (frames, H, W, 3), BGR, `size` being (H, W).

    `heart` replaces the one drawn for `ef` (percent); `seed` (an int or a sequence) determines all
    other draws: gain, attenuation, position, scale, tilt, phase, beat length (13-16 frames),
    speckle.
    """
    rng = np.random.default_rng(seed)
    heart, view, (H, W) = heart or draw_heart(ef, rng), VIEWS[view], size
    px = float(H / view.depth * rng.normal(1, 0.02))  # pixels per cm: the depth setting
    x = ((np.arange(W) - W / 2) / px).astype(np.float32)[None, :]
    z = (np.arange(H) / px).astype(np.float32)[:, None]
    turn = np.deg2rad(view.angle + rng.normal(0, 4))
    cx, cz = np.add(view.centre, rng.normal(0, 0.2, 2)).tolist()
    cos, sin, side = float(np.cos(turn)), float(np.sin(turn)), -1 if view.mirror else 1
    u, v = (z - cz) * cos - (x - cx) * sin, side * ((x - cx) * cos + (z - cz) * sin)
    depth, beam = np.hypot(x, z), np.abs(np.arctan2(x, z + 1e-6))
    fan = np.float32((beam < HALF_ANGLE) & (depth < view.depth * 0.97))
    fade = fan * np.exp(-rng.normal(0.035, 0.004) * depth) * rng.normal(1.0, 0.04)
    box = (beam < 0.5) & (depth > 2) & (depth < 11)  # where the scanner looks for flow
    scene = draw_scene(view, heart, shows_defect, u, v, rng)
    scene[..., 0] *= speckle((H, W), (0.06 * px, 0.1 * px), rng)
    phase = rng.uniform() + np.arange(frames) / rng.uniform(13, 16)
    axes, start = cavity_axes(heart, phase), half_axes(heart.long, heart.short, view.across)
    filling = np.gradient(volume(*axes)) / (30 if view.across else 17)  # mL a frame to colour
    out = np.empty((frames, H, W, 3), np.uint8)
    for i, (long, short) in enumerate(np.transpose(axes)):
        u0, v0 = displace(u, v, start, half_axes(long, short, view.across))
        map_x = (cx + side * v0 * cos - u0 * sin) * px + W / 2
        map_y = (cz + side * v0 * sin + u0 * cos) * px
        warped = cv2.remap(scene, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        noise = rng.standard_normal((H, W), dtype=np.float32) * 0.01
        # A low gain: speckle stays dimmer than turbulent flow.
        image = 0.4 * ((warped[..., 0] * fade).clip(0) ** 0.6 + noise * fan)
        if view.colour:
            flow = warped[..., 1] * max(filling[i], 0) + warped[..., 2] * max(-filling[i], 0)
            jet = warped[..., 3] * (phase[i] % 1 < 0.54)  # throughout systole
            image = colourise(image, flow * box, jet * box, rng)
        out[i] = (image.reshape(H, W, -1) * 255).clip(0, 255)
    return out


# ------------------------------------------------------------------------------------------ files


def write_video(path, frames, fps=30, fourcc="MJPG"):
    """Write BGR frames uint8 (n, H, W, 3) as a video; creates the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    size = (frames.shape[2], frames.shape[1])
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), fps, size)
    if not writer.isOpened():
        raise OSError(f"cannot write {path} with the codec {fourcc}")
    for frame in frames:
        writer.write(frame)
    writer.release()


# ----------------------------------------------------------------------------------------- cohort


def draw_study(seed, index):
    """Study `index` of a cohort: (patient number, Heart, views that show a defect).

    Two of every four studies have the same patient: the defect remains, EF changes a little.
    """
    patient = index // 4 * 3 + max(index % 4 - 1, 0)
    person = np.random.default_rng((seed, 1, patient))
    ef, defect = person.uniform(18, 70), person.uniform() < 0.4
    rng = np.random.default_rng((seed, 2, index))
    ef = float(np.clip(ef + rng.normal(0, 3), 15, 72).round(1))
    heart = draw_heart(ef, rng)
    seen = (DEFECT_VIEWS, DEFECT_VIEWS[:1], DEFECT_VIEWS[1:])[rng.choice(3, p=(0.5, 0.25, 0.25))]
    return patient, heart, seen if defect else ()


def make_cohort(folder, studies=100, seed=0, progress=iter, frames=16):
    """Write `videos/<eid>/<view>.avi`, `labels.csv` and `findings.csv` under `folder`.

    labels.csv: pid, eid, EF (percent), VSD (0 or 1). findings.csv: eid, video, shows_defect.
    A study depends only on the seed and its number. `progress` wraps the iterable of studies.
    """
    folder = Path(folder)
    labels, findings = [("pid", "eid", "EF", "VSD")], [("eid", "video", "shows_defect")]
    for index in progress(range(studies)):
        patient, heart, seen = draw_study(seed, index)
        eid = f"E{index:04d}"
        for k, view in enumerate(VIEWS):
            cine = phantom_cine(view, heart.ef, view in seen, frames, seed=(seed, 3, index, k),
                                heart=heart)  # fmt: skip
            write_video(folder / "videos" / eid / f"{view}.avi", cine, fps=20)
            findings.append((eid, f"{view}.avi", int(view in seen)))
        labels.append((f"P{patient:04d}", eid, heart.ef, int(bool(seen))))
    for name, rows in (("labels.csv", labels), ("findings.csv", findings)):
        with open(folder / name, "w", newline="") as f:
            csv.writer(f).writerows(rows)
